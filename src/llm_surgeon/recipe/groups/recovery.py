"""Options of the recovery: training of what is left, after the last shot."""

from __future__ import annotations

from pydantic import Field

from llm_surgeon.recipe.groups.base import FEW, Options, Quantity

LEARNING_RATE, BATCH_SIZE = 2e-4, 8


class RecoveryOptions(Options):
    """Tokens and steps of the training on the dense model's predictions; ``RecoverConfig`` has all of its options."""

    recover_tokens: Quantity | None = Field(
        None,
        description="Tokens of the calibration text to train what is left on after the last shot, on the dense "
        "model's predictions, such as 2M (unset: none). `llm-surgeon recover` does it later, with more options.",
    )
    recover_batch_size: int = Field(BATCH_SIZE, ge=1, le=FEW, description="Sequences of a step of that training.")
    recover_learning_rate: float = Field(
        LEARNING_RATE, gt=0.0, lt=1.0, description="Highest learning rate of that training."
    )
