"""Options of the curvature, and of the update that it gives."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from llm_surgeon.recipe.groups.base import FEW, MANY, Options
from llm_surgeon.recipe.methods import CURVATURES, CurvatureName


class CurvatureOptions(Options):
    """The approximation of the Fisher, its damping, and the update of the weights that stay."""

    curvature: CurvatureName | None = Field(
        None,
        description="Approximation of the Fisher, unset: the method's own. kfac, nearest-kronecker, kronecker-sum (two "
        "products), diagonal, activations or identity.",
    )
    fisher: Literal["empirical", "true"] = Field(
        "empirical", description="Labels of the gradients: empirical (the text's own) or true (sampled from the model)."
    )
    fisher_samples: int = Field(1, ge=1, le=FEW, description="Sampled labels per token with --fisher true.")
    gradient_share: float = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="Share of the tokens of each sequence that gradient factors are summed over, drawn by the size of "
        "their gradients and weighted (for K-FAC).",
    )
    dampening_a: float = Field(
        0.01, gt=0.0, description="Damping of the input factor A, as a fraction of its mean diagonal."
    )
    dampening_g: float = Field(
        0.1, gt=0.0, description="Damping of the gradient factor G, as a fraction of its mean diagonal."
    )
    max_correlations: int = Field(
        0,
        ge=0,
        le=MANY,
        description="Removed structures (or weights) whose update is computed together, at most; 0: all, 1: each as if "
        "the others stayed.",
    )
    update_steps: int = Field(
        20,
        ge=1,
        le=FEW,
        description="Conjugate-gradient steps of the update of unstructured and N:M pruning, at most.",
    )

    @field_validator("curvature")
    @classmethod
    def _check_curvature(cls, curvature: str | None) -> str | None:
        if curvature is not None and curvature not in CURVATURES:
            raise ValueError(f"is not known: valid are {', '.join(CURVATURES)}")
        return curvature
