"""Curvature of the loss: approximations of the Fisher, each estimated on the model as it is."""

from __future__ import annotations

from collections.abc import Mapping

from llm_surgeon.curvature.estimator import Curvature, Estimator, WarmStart
from llm_surgeon.curvature.estimators import ESTIMATORS, estimation_of, estimator_of
from llm_surgeon.curvature.factors import KroneckerFactors
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.passes.batch_major import Advance, Estimation
from llm_surgeon.passes.task import Task
from llm_surgeon.session.session import Session

__all__ = [
    "ESTIMATORS",
    "Curvature",
    "Estimation",
    "Estimator",
    "KroneckerFactors",
    "WarmStart",
    "estimate",
    "estimation_of",
    "estimator_of",
    "passes_needed",
]


def estimate(
    session: Session,
    keep: Mapping[str, KeepMask],
    how: Estimation,
    advance: Advance = lambda _tokens: None,
    start: WarmStart | None = None,
) -> Curvature:
    """Estimate the curvature of every prunable layer.

    Args:
        session: The run; its model is pruned so far.
        keep: Masks of the rows and columns that are left, which agree with the model.
        how: The approximation, and how the tokens are read.
        advance: Function that is called with the number of tokens after each batch.
        start: Factors of the last shot, from which a power iteration starts.

    Raises:
        NonFiniteError: If the loss is not finite.
        ConfigError: If the factors would not fit into memory.
        ProcessError: If another process is gone.
    """
    return ESTIMATORS[how.curvature].estimate(Task(session, keep, how, advance), start)


def passes_needed(how: Estimation, warm: bool) -> int:
    """Number of passes over the tokens that an estimation takes, with or without a warm start."""
    return ESTIMATORS[how.curvature].passes(how, warm)
