"""Operations of passes, counted from shapes."""

from __future__ import annotations

from typing import Literal

from llm_surgeon.models.skeleton import Skeleton


def model_operations(
    skeleton: Skeleton, order: Literal["batch-major", "layer-major"], kept: float, *, backward: bool
) -> float:
    """Operations per token of the model in one pass, forward and, if asked for, back without gradients of weights.

    Args:
        skeleton: The model without its weights.
        order: Order of the pass; layer by layer, blocks are run forward twice.
        kept: Share of the prunable weights that is left.
        backward: Whether gradients are taken.
    """
    blocks = kept * skeleton.anatomy.prunable_weights
    rest = skeleton.parameters - skeleton.anatomy.prunable_weights
    again = 2 * blocks if order == "layer-major" and backward else 0.0
    return 2 * (2 if backward else 1) * (rest + blocks) + again
