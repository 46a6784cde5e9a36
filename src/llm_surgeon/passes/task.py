"""A task: one estimation or fit in a session, and the passes over the text that it asks for, in either order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.passes.batch_major import Advance, Estimation, PassResult, run_pass
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.layer_major import LayerMajorPass
from llm_surgeon.session.session import Session
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.storage import TensorStore


def _untold(_tokens: int) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True)
class Task:
    """One estimation or fit on the model as it is.

    Attributes:
        session: The run; its model is pruned so far.
        keep: Rows and columns that are left of the prunable layers; agrees with the model.
        how: Batches, arithmetic, labels and order of the passes.
        advance: Takes the number of tokens after each batch.
        part: Tokens of this process to take; None takes the session's own.
    """

    session: Session
    keep: Mapping[str, KeepMask]
    how: Estimation
    advance: Advance = _untold
    part: CalibrationTokens | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model, as pruned so far."""
        return self.session.model

    @property
    def anatomy(self) -> Anatomy:
        """The prunable layers of the dense model."""
        return self.session.anatomy

    @property
    def tokens(self) -> CalibrationTokens:
        """Calibration tokens of this process."""
        return self.session.own if self.part is None else self.part

    @property
    def processes(self) -> Processes:
        """The processes that read the other tokens; sums are to be added up with theirs."""
        return self.session.processes

    @cached_property
    def store(self) -> TensorStore:
        """The store in which a layer-major pass keeps what would not fit otherwise; in memory if there is none."""
        return self.session.store or TensorStore(self.device)

    @property
    def device(self) -> torch.device:
        """The device on which the model runs; the weights of its blocks may be elsewhere."""
        return self.session.device

    def run(self, hooks: Hooks, *, backward: bool, finished: Callable[[int], None] = lambda _block: None) -> PassResult:
        """Run every batch through the model; hooks see inputs and, if ``backward``, gradients.

        Args:
            hooks: Observers of layers.
            backward: Whether gradients are taken.
            finished: Takes the number of each block once hooks will see nothing more of it; in a batch-major pass at
                its end.

        Raises:
            NonFiniteError: If the loss is not finite.
        """
        given = self.tokens, self.how, self.advance, self.processes
        if self.how.order == "layer-major":
            task = LayerMajorPass(self.model, self.anatomy.family.blocks, *given, self.store)
            return task.run(hooks, backward=backward, finished=finished)
        result = run_pass(self.model, hooks, *given, backward=backward)
        for block in range(self.anatomy.blocks):
            finished(block)
        return result
