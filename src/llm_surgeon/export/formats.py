"""The table of export formats."""

from __future__ import annotations

from llm_surgeon.export.format import Format
from llm_surgeon.export.hugging_face import HuggingFace
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.recipe.config import PruneConfig

FORMATS: dict[str, Format] = {form.name: form for form in (HuggingFace(),)}


def formats_of(config: PruneConfig) -> list[Format]:
    """The formats that a recipe exports in."""
    return [FORMATS[name] for name in config.formats]


def check_formats(config: PruneConfig, anatomy: Anatomy) -> None:
    """Find out before the work whether the formats of a recipe can say what it leaves.

    Raises:
        ConfigError: If one cannot.
    """
    for form in formats_of(config):
        form.check(config, anatomy)


def loaders(config: PruneConfig, model_type: str) -> tuple[str, ...]:
    """Engines that load the export of a recipe, format by format."""
    return tuple(line for form in formats_of(config) for line in form.loaders(config, model_type))
