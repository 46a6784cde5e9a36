"""Options of the methods that go layer by layer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm_surgeon.recipe.groups.base import MANY, Options
from llm_surgeon.recipe.methods import LayerwiseScope

LayerBudget = Literal["uniform", "owl"]
Refine = Literal["none", "dsnot", "r2-dsnot"]
Reweight = Literal["grow", "prune", "both"]


class LayerwiseOptions(Options):
    """Scores, budgets and refinements of the methods that go layer by layer."""

    scope: LayerwiseScope | None = Field(
        None,
        description="What the weights are compared within by a layer-wise score: row, layer or global (unset: the "
        "method's own).",
    )
    layer_budget: LayerBudget = Field(
        "uniform", description="Sparsity of the layers: uniform, or owl (blocks with more outliers keep more)."
    )
    owl_multiple: float = Field(5.0, gt=0.0, description="An outlier has more than so many times its block's mean.")
    owl_spread: float = Field(
        0.08, gt=0.0, lt=0.5, description="Half the difference between the largest and the least sparsity."
    )
    score_alpha: float = Field(0.5, ge=0.0, description="Exponent of the input norm in ria and stochria.")
    score_norm: float = Field(2.0, gt=0.0, description="The p of lp-ri.")
    score_ratio: float = Field(0.1, gt=0.0, le=1.0, description="Share of rows and columns that stochria draws.")
    score_activation: bool = Field(True, description="Whether stochria has ria's factor of input norms.")
    sparsegpt_block: int = Field(128, ge=1, le=MANY, description="Columns whose mask sparsegpt chooses together.")
    refine: Refine = Field(
        "none", description="Refinement of a score's mask without training: none, dsnot or r2-dsnot."
    )
    refine_reweight: Reweight = Field(
        "grow", description="Which step of r2-dsnot weighs relatively: grow, prune or both."
    )
    permute: bool = Field(
        False, description="For N:M: order input channels so that important weights spread over the groups."
    )
