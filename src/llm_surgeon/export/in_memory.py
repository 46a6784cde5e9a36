"""Saving of a model that was pruned in memory: ``save_pretrained`` writes what transformers loads again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.save import save_model
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy


@dataclass(frozen=True)
class PrunedSaving:
    """The ``save_pretrained`` of a model whose layers are not those of its class any more.

    An object rather than a function, so that copies and pickles of the model save their own weights.

    Attributes:
        model: The model.
        anatomy: The prunable layers of the dense model.
        keep: Rows and columns that are left of them; None if all are.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    keep: Mapping[str, KeepMask] | None

    def __call__(self, save_directory: str | Path, **settings: Any) -> None:
        """Write weights, configuration and, where the class needs it, the modelling file; the tokenizer is apart.

        Args:
            save_directory: Directory to write to; is made if it is not there.
            **settings: None is possible: they describe another form of the weights.

        Raises:
            ConfigError: If there are settings.
            DiskSpaceError: If the disk is full.
            OutputError: If writing fails for another reason.
        """
        if settings:
            raise ConfigError(
                f"A pruned model is saved without settings, and {', '.join(settings)} was given.",
                "Call save_pretrained(directory), or prune with out='...', and work on what it wrote.",
            )
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_model(self.model, None, self.anatomy, self.keep, directory)


def save_as_pruned(model: PreTrainedModel, anatomy: Anatomy, keep: Mapping[str, KeepMask] | None) -> None:
    """Let ``save_pretrained`` of a pruned model write what loads, where the class's own would not.

    Args:
        model: The pruned model.
        anatomy: The prunable layers of the dense model.
        keep: Rows and columns that are left of them; None if all are, and removed weights are zeros.
    """
    # Transposed layers were turned into plain ones to be pruned.
    if keep is not None or anatomy.family.transposed:
        model.save_pretrained = PrunedSaving(model, anatomy, keep)  # type: ignore[method-assign, assignment]
