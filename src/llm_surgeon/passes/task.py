"""Task of an estimator: the model and tokens that it works on, and the pass that it asks for, in either order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.passes.batch_major import Advance, Estimation, PassResult, run_pass
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.layer_major import LayerMajorPass
from llm_surgeon.system.processes import ALONE, Processes
from llm_surgeon.system.storage import TensorStore

# Curvatures whose sums a layer-major pass puts away block by block.
PUT_AWAY = ("kfac", "activations", "diagonal")


@dataclass(frozen=True)
class Task:
    """Task of an estimator: the model, tokens and options that it works on.

    Attributes:
        model: The model, as pruned so far.
        anatomy: Prunable layers of the model.
        keep: Rows and columns that are left of them; agrees with the model.
        tokens: Calibration tokens of this process.
        how: Approximation of the curvature, and options of the pass.
        advance: Called with the number of tokens after each batch.
        store: Store of a layer-major pass, for tensors that would not fit otherwise.
        processes: Processes that read the other tokens; sums are to be added up over them.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    keep: Mapping[str, KeepMask]
    tokens: CalibrationTokens
    how: Estimation
    advance: Advance
    store: TensorStore
    processes: Processes = ALONE

    @property
    def device(self) -> torch.device:
        """Device on which the model runs; the weights of its blocks may be elsewhere."""
        return next(self.model.parameters()).device

    def run(self, hooks: Hooks, *, backward: bool, finished: Callable[[int], None] = lambda _block: None) -> PassResult:
        """Run every batch through the model; hooks see inputs and, if ``backward``, gradients.

        Args:
            hooks: Hooks that look on.
            backward: Whether gradients are taken.
            finished: Called with the number of each block once hooks will see nothing more of it; in a batch-major
                pass at its end.

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
