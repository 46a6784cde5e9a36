"""Helpers for costs and updates that all structures share: the solver of a recipe, and checks for finite numbers."""

from __future__ import annotations

from torch import Tensor, nn

from llm_surgeon.errors import NonFiniteError
from llm_surgeon.mathematics.fisher import Solver
from llm_surgeon.mathematics.linalg import is_finite
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.recipe.config import PruneConfig


def solver_of(config: PruneConfig) -> Solver:
    """Solver for the updates of a recipe."""
    return Solver(config.max_correlations, config.update_steps)


def check_finite(layer: LinearLayer, *costs: Tensor) -> None:
    """Make sure that a layer's costs can be compared.

    Raises:
        NonFiniteError: If a cost is NaN or infinite.
    """
    if not all(is_finite(cost) for cost in costs):
        raise NonFiniteError(
            f"The pruning costs of {layer.name} are not finite.",
            "Run with --precision float32 and --dtype float32, or use more calibration samples.",
        )


def check_written(layer: LinearLayer, core: nn.Linear) -> None:
    """Make sure that an update has left finite weights and bias, in the type that the layer stores.

    Raises:
        NonFiniteError: If a weight or the bias is NaN or infinite.
    """
    if not all(is_finite(part) for part in (core.weight, core.bias) if part is not None):
        raise NonFiniteError(
            f"The update of {layer.name} overflows in {core.weight.dtype}.".replace("torch.", ""),
            "Run with --dtype float32, or with larger --dampening-a and --dampening-g.",
        )
