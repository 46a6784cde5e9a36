"""The table of export formats."""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.format import Format
from llm_surgeon.export.gguf.format import GGUF, Q8, BFloat16, Float16, Float32
from llm_surgeon.export.hugging_face import HuggingFace
from llm_surgeon.export.vllm.nemotron_nas import NemotronNas
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.formats import FORMATS as KNOWN
from llm_surgeon.recipe.formats import FormatRow

FORMATS: dict[str, Format] = {
    form.name: form for form in (HuggingFace(), GGUF(), Float32(), Float16(), BFloat16(), Q8(), NemotronNas())
}


def register_format(form: Format, summary: str) -> None:
    """Let recipes name a format of one's own (``formats``), within this process.

    Args:
        form: The format.
        summary: Description of the format, in a few words.

    Raises:
        ValueError: If the name is taken.
    """
    if form.name in FORMATS or not form.name:
        raise ValueError(f"the name {form.name!r} is taken; taken are {', '.join(FORMATS)}")
    FORMATS[form.name] = form
    KNOWN[form.name] = FormatRow(summary)


def formats_of(config: PruneConfig) -> list[Format]:
    """The formats that a recipe exports in."""
    return [FORMATS[name] for name in config.formats]


def main_format(config: PruneConfig) -> Format:
    """The format that report and card describe: the one in the export's own directory, or else the first."""
    formats = formats_of(config)
    return next((form for form in formats if not form.own_directory), formats[0])


def check_formats(config: PruneConfig, anatomy: Anatomy, settings: Any) -> None:
    """Find out before the work whether the formats of a recipe can say what it leaves; see ``Format.check``.

    Raises:
        ConfigError: If one cannot.
    """
    for form in formats_of(config):
        form.check(config, anatomy, settings)


def possible(config: PruneConfig, anatomy: Anatomy, settings: Any) -> tuple[str, ...]:
    """Names of the formats that can say what a recipe leaves, whether or not it names them; see ``Format.check``.

    Formats that differ from another in the type of the weights only, and are named after it, are left out.
    """
    found = []
    for name, form in FORMATS.items():
        if not any(name.startswith(f"{other}-") for other in FORMATS):
            with contextlib.suppress(ConfigError):
                form.check(config, anatomy, settings)
                found.append(name)
    return tuple(found)


def check_tokenizer(config: PruneConfig, tokenizer: PreTrainedTokenizerBase, settings: Any) -> None:
    """Find out before the work whether the formats of a recipe can say a tokenizer; see ``Format.check_tokenizer``.

    Raises:
        UnsupportedModelError: If one cannot.
    """
    for form in formats_of(config):
        form.check_tokenizer(tokenizer, settings)


def loaders(config: PruneConfig, settings: Any) -> tuple[str, ...]:
    """Engines that load the export of a recipe, format by format; see ``Format.loaders``."""
    return tuple(line for form in formats_of(config) for line in form.loaders(config, settings))
