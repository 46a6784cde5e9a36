"""Curvature of the loss: what each approximation needs, estimated on the model as it is."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedModel

from llm_surgeon.curvature.diagonal import estimate_diagonal
from llm_surgeon.curvature.factors import Curvature, KroneckerFactors
from llm_surgeon.curvature.kfac import estimate_kfac
from llm_surgeon.curvature.nearest import TERMS, NearestCurvature, WarmStart, estimate_nearest, passes_needed
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.passes.batch_major import Advance, Estimation
from llm_surgeon.passes.task import Task
from llm_surgeon.system.processes import ALONE, Processes
from llm_surgeon.system.storage import TensorStore

__all__ = [
    "Curvature",
    "Estimation",
    "KroneckerFactors",
    "NearestCurvature",
    "WarmStart",
    "estimate",
    "passes_needed",
]


def estimate(
    model: PreTrainedModel,
    anatomy: Anatomy,
    keep: Mapping[str, KeepMask],
    tokens: CalibrationTokens,
    how: Estimation,
    advance: Advance = lambda _tokens: None,
    previous: WarmStart | None = None,
    make_task: type[Task] = Task,
    store: TensorStore | None = None,
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
        previous: What the last shot found, from which a power iteration sets out.
        make_task: What runs the passes.
        store: Where a layer-major pass keeps what would not fit otherwise; in memory if None.
        processes: Who reads the other tokens; all get the curvature of all of them.

    Raises:
        NonFiniteError: If the loss is not finite.
        ConfigError: If nearest Kronecker products would not fit into memory.
        ProcessError: If another process is gone.
    """
    if how.curvature == "identity":
        return KroneckerFactors({}, {}, frozenset(), None)
    store = store or TensorStore(next(model.parameters()).device)
    task = make_task(model, anatomy, keep, tokens, how, advance, store, processes)
    if how.curvature == "diagonal":
        return estimate_diagonal(task)
    if how.curvature in TERMS:
        return estimate_nearest(task, previous)
    return estimate_kfac(task)
