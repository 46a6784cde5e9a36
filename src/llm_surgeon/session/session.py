"""A session: who prunes what, on which text, with which recipe, and who shares the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeVar

import torch
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy, LinearLayer
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.session.marks import Marks
from llm_surgeon.system.processes import ALONE, Processes
from llm_surgeon.system.progress import Progress, SilentProgress
from llm_surgeon.system.storage import TensorStore

T = TypeVar("T")


@dataclass(frozen=True)
class Session:
    """One run as its loop, its estimator and its stages see it.

    Attributes:
        model: The model that is pruned in place.
        anatomy: The prunable layers of the dense model.
        tokens: All calibration tokens.
        config: The recipe.
        progress: Where progress is shown.
        store: Keeps what has to wait in layer-major passes; None makes passes batch-major.
        processes: Who shares the run; all have the same model before and after each shot.
        dense: A copy of the model before pruning; None if no stage of the recipe needs it.
        marks: Where states inside a shot are kept for a later process.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    tokens: CalibrationTokens
    config: PruneConfig = field(default_factory=lambda: PruneConfig.from_mapping({}))
    progress: Progress = field(default_factory=SilentProgress)
    store: TensorStore | None = None
    processes: Processes = ALONE
    dense: PreTrainedModel | None = None
    marks: Marks = field(default_factory=Marks)

    @property
    def device(self) -> torch.device:
        """The device on which the model runs; weights of its blocks may be elsewhere."""
        return next(self.model.parameters()).device

    @property
    def order(self) -> Literal["batch-major", "layer-major"]:
        """Order of passes that take gradients: layer by layer with a store, batch by batch without."""
        return "batch-major" if self.store is None else "layer-major"

    @cached_property
    def own(self) -> CalibrationTokens:
        """This process's part of the calibration tokens."""
        return self.tokens.part(self.processes.part(self.tokens.n_samples))

    def present(self, layer: LinearLayer) -> AbstractContextManager[None]:
        """Keep the weights of a layer where the model runs; of use where weights are streamed."""
        return weights_of(self.model).present(self.model.get_submodule(layer.name))

    def settle(self, layer: LinearLayer) -> None:
        """Let changed weights of a layer go back to where they wait; of use where weights are streamed."""
        weights_of(self.model).settle(self.model.get_submodule(layer.name))

    def share_out(
        self, layers: Iterable[LinearLayer], compute: Callable[[LinearLayer], T], work: Callable[[LinearLayer], float]
    ) -> Iterator[tuple[LinearLayer, T]]:
        """Compute something for each layer, each in one of the processes.

        Args:
            layers: The layers.
            compute: The computation for one of them.
            work: Operations of that computation, up to a common factor, by which layers are shared out.

        Yields:
            Each layer with its result, in an order that all processes have in common.
        """
        named = {layer.name: layer for layer in layers}
        shares = {name: work(layer) for name, layer in named.items()}

        def one(name: str) -> T:
            if self.store is not None:
                # Decompositions of layers of other sizes do not fit where those of the last layer were.
                self.store.keep_within()
            return compute(named[name])

        for name, result in self.processes.share_out(shares, one):
            yield named[name], result


def decomposition_work(keep: KeepMask) -> float:
    """Operations of the decompositions of both sides of a matrix, up to a common factor."""
    return float(sum(size**3 for size in keep.shape))
