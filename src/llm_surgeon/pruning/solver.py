"""The solver of updates that a recipe asks for."""

from __future__ import annotations

from llm_surgeon.mathematics.fisher import Solver
from llm_surgeon.recipe.config import PruneConfig


def solver_of(config: PruneConfig) -> Solver:
    """Solver for the updates of a recipe."""
    return Solver(config.max_correlations, config.update_steps)
