"""What all structures ask of costs and updates."""

from __future__ import annotations

from torch import Tensor

from llm_surgeon.config import PruneConfig
from llm_surgeon.errors import NonFiniteError
from llm_surgeon.fisher import Solver
from llm_surgeon.models.anatomy import LinearLayer


def solver_of(config: PruneConfig) -> Solver:
    """How the updates of a recipe are computed."""
    return Solver(config.max_correlations, config.update_steps)


def check_finite(layer: LinearLayer, *costs: Tensor) -> None:
    """Make sure that a layer's costs can be compared.

    Raises:
        NonFiniteError: If one is NaN or infinite.
    """
    if not all(bool(cost.isfinite().all()) for cost in costs):
        raise NonFiniteError(
            f"The pruning costs of {layer.name} are not finite.",
            "Run with --precision float32 and --dtype float32, or use more calibration samples.",
        )
