"""The socket for export formats: files that some engine loads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.family import Family
from llm_surgeon.recipe.config import PruneConfig


@dataclass(frozen=True)
class Exported:
    """A pruned model that is to be written.

    Attributes:
        model: The model in memory.
        tokenizer: Tokenizer of the model.
        family: Entry of the model's architecture.
        anatomy: Prunable layers of the dense model; None for a model that was read from an export.
        keep: Rows and columns that are left of them; None if all are, and removed weights are zeros.
        source: Directory whose tokenizer, licence and the like belong to the model; None if there is none.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    family: Family
    anatomy: Anatomy | None
    keep: Mapping[str, KeepMask] | None
    source: Path | None = None


class Format(ABC):
    """One way to write a model.

    Attributes:
        name: Name in the recipe.
        own_directory: Whether its files stand in a directory of its name inside that of the export. Only what
            ``from_pretrained`` loads stands in that of the export itself: it is what report and card describe.
        engine: What has to be there for ``verify``, in words, where it may be missing.
    """

    name: ClassVar[str]
    own_directory: ClassVar[bool] = True
    engine: ClassVar[str] = ""

    @abstractmethod
    def loaders(self, config: PruneConfig, settings: Any) -> tuple[str, ...]:
        """Engines that load the export of a recipe, and what not to expect of them.

        Args:
            config: The recipe.
            settings: Configuration of the dense model.
        """

    def check(self, config: PruneConfig, anatomy: Anatomy, settings: Any) -> None:
        """Find out before the work whether the format can say what a recipe leaves.

        Args:
            config: The recipe.
            anatomy: Prunable layers of the dense model.
            settings: Configuration of the dense model.

        Raises:
            ConfigError: If it cannot; says what would make it possible.
        """
        return

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, settings: Any) -> None:
        """Find out before the work whether the format can say a tokenizer.

        Args:
            tokenizer: The tokenizer.
            settings: Configuration of the dense model.

        Raises:
            UnsupportedModelError: If it cannot; says what would make it possible.
        """
        return

    def check_result(self, exported: Exported) -> None:
        """Find out before anything is written whether the format can say a model.

        Raises:
            ConfigError: If it cannot; says what would make it possible.
        """
        return

    def loading(self) -> tuple[str, ...]:
        """Lines of Python that load the files; ``{place}`` stands for their directory, with its quotes.

        They are for an export that ``from_pretrained`` cannot load, as no format of it is made for that.
        """
        return ()

    def nbytes(self, parameters: int, dtype: torch.dtype) -> int:
        """Bytes of the weight files of a model, for the plan and the room on the disk.

        Args:
            parameters: Parameters that are stored.
            dtype: Their type in memory.
        """
        return parameters * dtype.itemsize

    @abstractmethod
    def write(self, exported: Exported, directory: Path) -> bool:
        """Write the model into a directory that exists.

        Returns:
            Whether a plain class of the engine loads it, without code that the export brings.

        Raises:
            ConfigError: If the format cannot say the model; nothing is written then.
            DiskSpaceError: If the disk is full.
            OutputError: If writing fails for another reason.
        """

    @abstractmethod
    def verify(self, exported: Exported, directory: Path, plain: bool) -> ReloadCheck | None:
        """Load the files with the engine itself, and compare logits with the model in memory.

        Returns:
            The largest difference; None if the engine is not installed here.

        Raises:
            ExportMismatchError: If they differ.
        """

    @abstractmethod
    def weight_bytes(self, directory: Path) -> int:
        """Bytes of the weight files in a directory."""
