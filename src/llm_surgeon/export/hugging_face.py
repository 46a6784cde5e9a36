"""The format of Hugging Face: safetensors, configuration and tokenizer, for transformers and engines that read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.format import Exported, Format
from llm_surgeon.export.save import save_model, weight_bytes
from llm_surgeon.export.verify import ReloadCheck, verify_export
from llm_surgeon.recipe.config import PruneConfig


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
                f"transformers without remote code; engines that read all widths of {model_type} from its "
                "configuration",
            )
        return (
            "transformers with trust_remote_code=True, as the export brings its modelling file; no serving engine, as "
            "layers differ in their shapes",
        )

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
