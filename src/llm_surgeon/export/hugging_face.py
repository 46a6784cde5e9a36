"""The format of Hugging Face: safetensors, configuration and tokenizer, for transformers and engines that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.format import Exported, Format
from llm_surgeon.export.save import save_model, weight_bytes
from llm_surgeon.export.verify import ReloadCheck, verify_export
from llm_surgeon.models import Family, family_of
from llm_surgeon.models.parts import Attention, FeedForward
from llm_surgeon.recipe.config import PruneConfig

# Version of the engine that the forms were verified with.
VERIFIED = "vLLM 0.32.0"
# Structures whose uneven widths are those of standard blocks.
_STANDARD = frozenset({"neurons", "heads"})


class HuggingFace(Format):
    """A directory that ``from_pretrained`` loads."""

    name = "hf"
    own_directory = False

    def loaders(self, config: PruneConfig, settings: Any) -> tuple[str, ...]:
        """Engines that load the export; see ``Format.loaders``."""
        model_type = settings.model_type
        if not config.parts:
            return (
                f"transformers, and each serving engine that loads {model_type}: all shapes are those of the dense "
                "model; zeros by themselves make it no faster",
            )
        if config.uniform:
            return (
                f"transformers without remote code, and each engine that reads all widths of {model_type} from its "
                f"configuration; verified with {VERIFIED} for llama and qwen2",
            )
        family = family_of(model_type)
        code = "transformers with trust_remote_code=True, as the export brings its modelling file"
        others = [type(entry).__name__ for entry in family.parts if not isinstance(entry, (Attention, FeedForward))]
        if others:
            return (
                f"{code}; no serving engine, as vLLM's backend for transformers and llama.cpp's files have no "
                f"{others[0]} of other widths: --uniform leaves a plain class",
            )
        concerned = [entry for entry in family.parts if set(entry.structures) & set(config.parts)]
        standard = set(config.parts) <= _STANDARD and not any(entry.fixed for entry in concerned)
        if standard and family.text_config is None:
            empty = "" if config.least_width else "; vLLM needs attention in every block, which --min-width keeps"
            return (
                f"{code}; vLLM with its backend for transformers and --trust-remote-code, verified with {VERIFIED} "
                f"for llama and qwen2{empty}",
            )
        return (f"{code}; no serving engine, as {_why_not(config, family)}",)

    def write(self, exported: Exported, directory: Path) -> bool:
        """Write the model; see ``Format.write``."""
        e = exported
        if e.anatomy is None:
            raise ConfigError("The export is in the format hf already.", "Give another --format.")
        return save_model(e.model, e.tokenizer, e.anatomy, e.keep, directory, e.source).plain

    def verify(self, exported: Exported, directory: Path, plain: bool) -> ReloadCheck:
        """Load the export in a fresh process without this package; see ``verify_export``."""
        return verify_export(exported.model, directory, plain)

    def weight_bytes(self, directory: Path) -> int:
        """Bytes of the safetensors."""
        return weight_bytes(directory)


def _why_not(config: PruneConfig, family: Family) -> str:
    """Reason why no serving engine builds what a recipe leaves, and the structure that one does."""
    if family.text_config is not None:
        return "the text tower has layers of its own: with --uniform its class is the usual one"
    if set(config.parts) <= _STANDARD:
        return "the class ties the number of heads to the hidden size: vLLM serves --structure neurons"
    missing = "parts of blocks are missing" if "blocks" in config.parts else "layers skip channels"
    return f"{missing}: vLLM and llama.cpp serve --structure neurons+heads"
