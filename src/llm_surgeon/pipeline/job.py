"""The shots of a run, measured and put on record one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.config import PruneConfig
from llm_surgeon.evaluation.memory import peak_bytes, reset_peak
from llm_surgeon.evaluation.perplexity import EvaluationText, perplexity
from llm_surgeon.models import Anatomy
from llm_surgeon.pipeline.clock import Clock
from llm_surgeon.pipeline.layerwise import run_layerwise
from llm_surgeon.pipeline.result import ShotResult
from llm_surgeon.pipeline.shots import run_shots
from llm_surgeon.pipeline.structures import Masks
from llm_surgeon.pipeline.texts import Texts
from llm_surgeon.processes import ALONE, Processes
from llm_surgeon.records import LayerRecord, Memory, Perplexity, Plan, PruneReport, ShotRecord, Size
from llm_surgeon.report.progress import Progress
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a run works on, and who does it together; ``source``, ``command`` and ``plan`` are for the report."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    anatomy: Anatomy
    texts: Texts
    config: PruneConfig
    progress: Progress
    source: str
    command: str | None = None
    plan: Plan | None = None
    processes: Processes = ALONE


def run_job(
    job: Job, after_shot: Callable[[PruneReport, Masks], None] = lambda _report, _masks: None
) -> tuple[PruneReport, Masks]:
    """Prune in place, with an evaluation before the first shot and after each.

    Args:
        job: What to work on.
        after_shot: Called after each shot with the report so far and what is left, while the model is as they say.

    Returns:
        The report of all shots and what is left; the export is the caller's.
    """
    model, text = job.model, job.texts.evaluation
    device = next(model.parameters()).device
    reset_peak(device)
    size = Size(prunable=job.anatomy.prunable_weights, total=count_parameters(model))
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    dense = measure(model, text, job.progress, "dense: perplexity", job.processes) if text else None
    peak, factor_bytes, masks = peak_bytes(device), 0, cast(Masks, {})
    shots: list[ShotRecord] = []

    def report() -> PruneReport:
        return PruneReport(
            model=job.source,
            family=job.anatomy.family.model_type,
            config=job.config.resolved(),
            calibration=job.texts.calibration.provenance,
            dense_size=size,
            dense_perplexity=dense,
            shots=tuple(shots),
            layers=tuple(_layer_records(job.anatomy, masks)),
            memory=Memory(peak=peak, model=model_bytes, factors=factor_bytes),
            versions=versions(),
            command=job.command,
            plan=job.plan,
            processes=job.processes.count,
        )

    run = run_layerwise if job.config.layerwise else run_shots
    for result in run(model, job.anatomy, job.texts.calibration, job.config, job.progress, job.processes):
        masks, factor_bytes = result.masks, max(factor_bytes, result.factor_bytes)
        shots.append(_evaluated(job, result))
        peak = max(peak, *shots[-1].peaks.values())
        after_shot(report(), masks)
    return report(), masks


def _evaluated(job: Job, result: ShotResult) -> ShotRecord:
    """Measure the model as it is after a shot, and write the shot's record."""
    config, text = job.config, job.texts.evaluation
    clock = Clock(next(job.model.parameters()).device)
    with clock.phase("evaluation"):
        description = f"shot {result.shot}/{config.shots}: perplexity"
        measured = measure(job.model, text, job.progress, description, job.processes) if text else None
    record = _shot_record(result, job, measured, clock)
    logger.info(
        "shot %d/%d: %.1f %% of the prunable weights left%s",
        result.shot,
        config.shots,
        100 * (1 - record.sparsity),
        f", perplexity {measured.perplexity:.2f}" if measured else "",
    )
    return record


def measure(
    model: PreTrainedModel, text: EvaluationText, progress: Progress, description: str, processes: Processes = ALONE
) -> Perplexity:
    """Perplexity, with the progress of this process shown."""
    with progress.phase(description, len(processes.own(text.windows)) * text.stride) as phase:
        return perplexity(model, text, phase.advance, processes=processes)


def _shot_record(result: ShotResult, job: Job, measured: Perplexity | None, evaluation: Clock) -> ShotRecord:
    dense, weights = job.anatomy.prunable_weights, sum(mask.weights for mask in result.masks.values())
    stored = sum(rows * columns for rows, columns in (mask.shape for mask in result.masks.values()))
    return ShotRecord(
        shot=result.shot,
        target_sparsity=result.target_sparsity,
        sparsity=1 - weights / dense,
        # Zeros that are stored are no parameters.
        size=Size(prunable=weights, total=count_parameters(job.model) - (stored - weights)),
        threshold=result.threshold,
        structures_removed=result.removed,
        structures_implied=result.implied,
        loss=result.loss,
        curvature_seconds=result.seconds["curvature"],
        selection_seconds=result.seconds["selection"],
        update_seconds=result.seconds["update"],
        evaluation_seconds=evaluation.seconds["evaluation"],
        perplexity=measured,
        costs=result.costs,
        correction_seconds=result.seconds.get("correction", 0.0),
        correction=result.correction,
        peaks=result.peaks | evaluation.peaks,
    )


def _layer_records(anatomy: Anatomy, masks: Masks) -> list[LayerRecord]:
    return [
        LayerRecord(
            name=name,
            block=layer.block,
            kind=layer.kind,
            rows=masks[name].shape[0],
            columns=masks[name].shape[1],
            rows_dense=layer.rows,
            columns_dense=layer.columns,
            weights=masks[name].weights,
        )
        for name, layer in anatomy.layers.items()
    ]


def count_parameters(model: torch.nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
