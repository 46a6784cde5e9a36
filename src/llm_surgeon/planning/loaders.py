"""Who can load the result."""

from __future__ import annotations

from llm_surgeon.recipe.config import PruneConfig


def loaders(config: PruneConfig, model_type: str) -> tuple[str, ...]:
    """What can load the export of a recipe, and what not to expect of it.

    Args:
        config: The recipe.
        model_type: ``config.model_type`` of the dense model.
    """
    if not config.parts:
        return (
            f"transformers, and each serving engine that loads {model_type}: all shapes are those of the dense model; "
            "zeros by themselves make it no faster",
        )
    if config.uniform:
        return (
            f"transformers without remote code; engines that read all widths of {model_type} from its configuration",
        )
    return (
        "transformers with trust_remote_code=True, as the export brings its modelling file; no serving engine, as "
        "layers differ in their shapes",
    )
