"""The shots of a run, measured and put on record one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.data.texts import Texts
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.export.form import parameters_of
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models import Anatomy
from llm_surgeon.pruning.layerwise import run_layerwise
from llm_surgeon.pruning.result import RunState, ShotResult
from llm_surgeon.pruning.shots import run_shots
from llm_surgeon.pruning.structures import Masks
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import LayerRecord, Memory, Perplexity, Plan, PruneReport, ShotRecord, Size
from llm_surgeon.system.clock import Clock
from llm_surgeon.system.memory import peak_bytes, reset_peak
from llm_surgeon.system.processes import ALONE, Processes
from llm_surgeon.system.progress import Progress
from llm_surgeon.system.storage import Budgets, TensorStore
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What a run works on, and who does it together; ``source``, ``command`` and ``plan`` are for the report.

    ``dense`` is what reconstruction aims at: None without it, see ``goal_of``. ``files`` is the directory of the dense
    checkpoint, whose tokenizer and licence go along with the result; None if the model comes from none.
    """

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
    dense: PreTrainedModel | None = None
    files: Path | None = None


@dataclass(frozen=True)
class Reached:
    """How far a run has come: its report up to a shot, and where it stands."""

    report: PruneReport
    standing: RunState


def run_job(
    job: Job, after_shot: Callable[[Reached], None] = lambda _reached: None, since: Reached | None = None
) -> Reached:
    """Prune in place, with an evaluation before the first shot and after each.

    Args:
        job: What to work on; its model is dense, or as ``since`` says.
        after_shot: Called with how far the run has come, while the model is as that says: after each shot, and once
            more when the shot's perplexity is known. What can be lost is then kept before the evaluation.
        since: How far an earlier run of the same job had come.

    Returns:
        How far it has come with the last shot; the export is the caller's.
    """
    reached = None if since is None else _measured(job, _continued(since), after_shot)
    report = _dense_report(job) if reached is None else reached.report
    for result in _results(job, since):
        record = _shot_record(result, job)
        memory = Memory(
            peak=max(report.memory.peak, *record.peaks.values()),
            model=report.memory.model,
            factors=max(report.memory.factors, result.factor_bytes),
        )
        layers = tuple(_layer_records(job.anatomy, result.masks))
        report = report.model_copy(update={"shots": (*report.shots, record), "layers": layers, "memory": memory})
        after_shot(Reached(report, result.standing))
        reached = _measured(job, Reached(report, result.standing), after_shot)
        report = reached.report
    assert reached is not None  # there is at least one shot
    return reached


def _measured(job: Job, reached: Reached, after_shot: Callable[[Reached], None]) -> Reached:
    """Measure the model as it is after the last shot of a report, if that is still to be done, and put it on record."""
    text, last = job.texts.evaluation, reached.report.shots[-1]
    if text is not None and last.perplexity is None:
        clock = Clock(next(job.model.parameters()).device)
        description = f"shot {last.shot}/{job.config.shots}: perplexity"
        with clock.phase("evaluation"):
            measured = measure(job.model, text, job.progress, description, job.processes)
        last = last.model_copy(
            update={
                "perplexity": measured,
                "evaluation_seconds": clock.seconds["evaluation"],
                "peaks": last.peaks | clock.peaks,
            }
        )
        memory = reached.report.memory
        memory = memory.model_copy(update={"peak": max(memory.peak, *last.peaks.values())})
        report = reached.report.model_copy(update={"shots": (*reached.report.shots[:-1], last), "memory": memory})
        reached = Reached(report, reached.standing)
        after_shot(reached)
    logger.info(
        "shot %d/%d: %.1f %% of the prunable weights left%s",
        last.shot,
        job.config.shots,
        100 * (1 - last.sparsity),
        f", perplexity {last.perplexity.perplexity:.2f}" if last.perplexity else "",
    )
    return reached


def _dense_report(job: Job) -> PruneReport:
    """The report before the first shot."""
    model, text = job.model, job.texts.evaluation
    device = next(model.parameters()).device
    reset_peak(device)
    dense = measure(model, text, job.progress, "dense: perplexity", job.processes) if text else None
    model_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return PruneReport(
        model=job.source,
        family=job.anatomy.family.model_type,
        config=job.config.resolved(),
        calibration=job.texts.calibration.provenance,
        dense_size=Size(prunable=job.anatomy.prunable_weights, total=count_parameters(model)),
        dense_perplexity=dense,
        shots=(),
        layers=(),
        memory=Memory(peak=peak_bytes(device), model=model_bytes, factors=0),
        versions=versions(),
        command=job.command,
        plan=job.plan,
        processes=job.processes.count,
    )


def _continued(since: Reached) -> Reached:
    """How far an earlier run had come, which now goes on."""
    continued = *since.report.continued, since.standing.shot
    return Reached(since.report.model_copy(update={"continued": continued, "versions": versions()}), since.standing)


def _results(job: Job, since: Reached | None) -> Iterator[ShotResult]:
    """The shots that are still to be made, each made when it is asked for."""
    given = job.model, job.anatomy, job.texts.calibration, job.config, job.progress, _store(job), job.processes
    if not job.config.layerwise:
        return run_shots(*given, since=None if since is None else since.standing, dense=job.dense)
    # There is one shot.
    return run_layerwise(*given) if since is None else iter(())


def _store(job: Job) -> TensorStore | None:
    """Where what a run cannot hold waits, if the run goes layer by layer."""
    if not (job.plan.order == "layer-major" if job.plan else job.config.order == "layer-major"):
        return None
    limits: dict[str, int | None] = {}
    if (plan := job.plan) is not None:
        limits = {"host": plan.store_host, "device": plan.store_device, "process": plan.host_available}
    known = {place: limit for place, limit in limits.items() if limit is not None}
    return TensorStore(next(job.model.parameters()).device, Budgets(**known))


def measure(
    model: PreTrainedModel, text: EvaluationText, progress: Progress, description: str, processes: Processes = ALONE
) -> Perplexity:
    """Perplexity, with the progress of this process shown."""
    with progress.phase(description, len(processes.own(text.windows)) * text.stride) as phase:
        return perplexity(model, text, phase.advance, processes=processes)


def _shot_record(result: ShotResult, job: Job) -> ShotRecord:
    """The record of a shot before its evaluation."""
    dense, weights = job.anatomy.prunable_weights, sum(mask.weights for mask in result.masks.values())
    stored = sum(rows * columns for rows, columns in (mask.shape for mask in result.masks.values()))
    keep = {name: mask for name, mask in result.masks.items() if isinstance(mask, KeepMask)}
    parameters = parameters_of(job.model, job.anatomy, keep or None, job.model.config)
    return ShotRecord(
        shot=result.shot,
        target_sparsity=result.target_sparsity,
        sparsity=1 - weights / dense,
        # Zeros that are stored are no parameters.
        size=Size(prunable=weights, total=parameters - (stored - weights)),
        threshold=result.threshold,
        structures_removed=result.removed,
        structures_implied=result.implied,
        loss=result.loss,
        curvature_seconds=result.seconds["curvature"],
        selection_seconds=result.seconds["selection"],
        update_seconds=result.seconds["update"],
        evaluation_seconds=0.0,
        perplexity=None,
        costs=result.costs,
        correction_seconds=result.seconds.get("correction", 0.0),
        correction=result.correction,
        reconstruction_seconds=result.seconds.get("reconstruction", 0.0),
        reconstruction=result.reconstruction,
        gates_seconds=result.seconds.get("gates", 0.0),
        gates=result.gates,
        peaks=result.peaks,
        profile=result.profile,
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
