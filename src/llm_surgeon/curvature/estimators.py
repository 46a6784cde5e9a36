"""The table of estimators, and the estimation that a recipe asks for."""

from __future__ import annotations

from collections.abc import Iterable

from llm_surgeon.curvature.diagonal import DiagonalEstimator
from llm_surgeon.curvature.estimator import Estimator
from llm_surgeon.curvature.kfac import IdentityEstimator, InputEstimator, KfacEstimator
from llm_surgeon.curvature.nearest import KroneckerSumEstimator, NearestEstimator
from llm_surgeon.curvature.routing import RoutingEstimator
from llm_surgeon.mathematics.expert_scores import EXPERT_SCORES
from llm_surgeon.passes.batch_major import Estimation
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.methods import Curvature as CurvatureRow
from llm_surgeon.recipe.methods import register_curvature

# The rows of ``recipe.methods.CURVATURES`` say which options of a recipe each estimator knows.
ESTIMATORS: dict[str, Estimator] = {
    estimator.name: estimator
    for estimator in (
        KfacEstimator(),
        NearestEstimator(),
        KroneckerSumEstimator(),
        DiagonalEstimator(),
        InputEstimator(),
        IdentityEstimator(),
        *(RoutingEstimator(name) for name in EXPERT_SCORES),
    )
}


def register_estimator(estimator: Estimator, row: CurvatureRow, methods: Iterable[str]) -> None:
    """Let recipes name an approximation of your own (``curvature``), within this process.

    Args:
        estimator: The estimator.
        row: Row of the estimator in the table of recipes.
        methods: Global methods that can work with it.

    Raises:
        ValueError: If the name is taken, or a method is not a global one.
    """
    register_curvature(estimator.name, row, methods)
    ESTIMATORS[estimator.name] = estimator


def estimation_of(config: PruneConfig) -> Estimation:
    """The estimation of a recipe, batch by batch; for a method that has none, the estimation of inputs.

    Args:
        config: The recipe. A shot replaces the seed, to draw labels and tokens of its own.
    """
    return Estimation(
        config.sequences_per_pass,
        config.precision,
        config.resolved_curvature or "activations",
        sampled_labels=config.fisher_samples if config.fisher == "true" else 0,
        gradient_share=config.gradient_share,
        seed=config.seed,
    )


def estimator_of(config: PruneConfig) -> Estimator | None:
    """The estimator of a recipe; None for methods that estimate no curvature, as the layer-wise ones."""
    name = config.resolved_curvature
    return None if name is None else ESTIMATORS[name]
