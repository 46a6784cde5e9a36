"""What an estimator works on, and the pass that it asks for, in either order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from llm_surgeon.curvature.hooks import Hooks
from llm_surgeon.curvature.layer_major import LayerMajorPass
from llm_surgeon.curvature.passes import Advance, Estimation, PassResult, run_pass
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.selection import KeepMask
from llm_surgeon.storage import TensorStore


@dataclass(frozen=True)
class Task:
    """What an estimator works on.

    Attributes:
        model: The model, as pruned so far.
        anatomy: Its prunable layers.
        keep: Rows and columns that are left of them; agrees with the model.
        tokens: Calibration tokens.
        how: Which approximation, and how.
        advance: Called with the number of tokens after each batch.
        store: Where a layer-major pass keeps what would not fit otherwise.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    keep: Mapping[str, KeepMask]
    tokens: CalibrationTokens
    how: Estimation
    advance: Advance
    store: TensorStore

    def run(self, hooks: Hooks, *, backward: bool, finished: Callable[[int], None] = lambda _block: None) -> PassResult:
        """Run every batch through the model; hooks see inputs and, if ``backward``, gradients.

        Args:
            hooks: What is looked at.
            backward: Whether gradients are taken.
            finished: Called with the number of a block of which hooks will see nothing more; in a batch-major pass
                all are finished at its end, and it is not called.

        Raises:
            NonFiniteError: If the loss is not finite.
        """
        if self.how.order == "batch-major":
            return run_pass(self.model, hooks, self.tokens, self.how, backward=backward, advance=self.advance)
        return LayerMajorPass(
            self.model, self.anatomy.family.blocks, self.tokens, self.how, self.advance, self.store
        ).run(hooks, backward=backward, finished=finished)
