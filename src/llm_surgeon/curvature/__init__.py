"""Curvature of the loss: what each approximation needs, estimated on the model as it is."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from llm_surgeon.curvature.diagonal import estimate_diagonal
from llm_surgeon.curvature.factors import Curvature, KroneckerFactors
from llm_surgeon.curvature.kfac import estimate_kfac
from llm_surgeon.curvature.nearest import TERMS, NearestCurvature, estimate_nearest, passes_needed
from llm_surgeon.curvature.passes import Advance, Estimation, Task, Tokens
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.processes import ALONE, Processes
from llm_surgeon.selection import KeepMask

__all__ = ["Curvature", "Estimation", "KroneckerFactors", "NearestCurvature", "estimate", "passes_needed"]


def estimate(
    model: PreTrainedModel,
    anatomy: Anatomy,
    keep: Mapping[str, KeepMask],
    tokens: Tokens,
    how: Estimation,
    advance: Advance = lambda _tokens: None,
    previous: Curvature | None = None,
    make_task: type[Task] = Task,
    processes: Processes = ALONE,
) -> Curvature:
    """Estimate the curvature of every prunable layer.

    Args:
        model: The model, as pruned so far.
        anatomy: Its prunable layers.
        keep: Rows and columns that are left of them; must agree with the model.
        tokens: Calibration tokens of this process.
        how: Which approximation, and how.
        advance: Called with the number of tokens after each batch.
        previous: The estimate of the last shot, from which a power iteration sets out.
        make_task: What runs the passes.
        processes: Who reads the other tokens; all get the curvature of all of them.

    Raises:
        NonFiniteError: If the loss is not finite.
        ConfigError: If nearest Kronecker products would not fit into memory.
        ProcessError: If another process is gone.
    """
    if how.curvature == "identity":
        return KroneckerFactors({}, {}, frozenset(), None)
    task = make_task(model, anatomy, keep, tokens, how, advance, processes)
    if how.curvature == "diagonal":
        return estimate_diagonal(task)
    if how.curvature in TERMS:
        warm = previous if isinstance(previous, NearestCurvature) else None
        return estimate_nearest(task, warm)
    return estimate_kfac(task)
