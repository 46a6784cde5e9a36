"""Options of first-order corrections: low-rank adapters that are trained after each shot."""

from __future__ import annotations

from pydantic import Field

from llm_surgeon.recipe.groups.base import FEW, MANY, Options


class LoraOptions(Options):
    """Rank and training of the corrections after a shot."""

    lora: bool = Field(False, description="First-order corrections: train low-rank adapters after each shot (peft).")
    lora_rank: int = Field(16, ge=1, le=FEW, description="Rank of the corrections of one shot.")
    lora_learning_rate: float = Field(1e-3, gt=0.0, description="Learning rate of the corrections.")
    lora_steps: int = Field(
        32, ge=1, le=MANY, description="Optimizer steps of the corrections after a shot, a batch each."
    )
    lora_final_steps: int = Field(32, ge=1, le=MANY, description="Steps after the last shot.")
    lora_batch_size: int = Field(2, ge=1, le=FEW, description="Sequences of a step.")
