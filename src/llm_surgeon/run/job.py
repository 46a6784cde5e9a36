"""The shots of a run, each measured and put on record."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.data.texts import Texts
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.export.form import parameters_of
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models import Anatomy
from llm_surgeon.pruning.loops import loop_of
from llm_surgeon.pruning.result import RunState, ShotResult
from llm_surgeon.pruning.structures import Masks
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import LayerRecord, Memory, Perplexity, Plan, PruneReport, ShotRecord, Size
from llm_surgeon.refit.stages import phase_name
from llm_surgeon.report.origin import origin_of
from llm_surgeon.session.session import Session
from llm_surgeon.system.clock import Clock
from llm_surgeon.system.memory import peak_bytes, reset_peak
from llm_surgeon.system.processes import ALONE, Processes
from llm_surgeon.system.progress import Progress
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A session with its texts, and with names and files for the report and the export.

    Attributes:
        session: The run, whose model is dense, or as a checkpoint has left it.
        tokenizer: Tokenizer of the model.
        texts: Calibration and evaluation text.
        source: Name of the model.
        command: The command line; None if the run was called from Python.
        plan: The plan of the run; None without one.
        files: Directory of the dense checkpoint, whose tokenizer and licence go along with the result; None if there is
            no such directory.
    """

    session: Session
    tokenizer: PreTrainedTokenizerBase
    texts: Texts
    source: str
    command: str | None = None
    plan: Plan | None = None
    files: Path | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model that is pruned in place."""
        return self.session.model

    @property
    def anatomy(self) -> Anatomy:
        """Anatomy of the dense model."""
        return self.session.anatomy

    @property
    def config(self) -> PruneConfig:
        """The recipe."""
        return self.session.config


def report_of(state: RunState) -> PruneReport:
    """The report of a state, which has to have one."""
    assert state.report is not None, "a run keeps its report"
    return state.report


def run_job(
    job: Job, after_shot: Callable[[RunState], None] = lambda _state: None, since: RunState | None = None
) -> RunState:
    """Prune in place, with an evaluation before the first shot and after each shot.

    Args:
        job: The run, whose model is dense, or in the state of ``since``.
        after_shot: Function that is called with the state of the run: after each shot, and once more when the shot's
            perplexity is known. A checkpoint is thus written before the evaluation, which may fail.
        since: State of an earlier run of the same job, with its report; None begins with the first shot.

    Returns:
        The state after the last shot, with the report; the caller exports the model.
    """
    state = None if since is None else _measured(job, _continued(since), after_shot)
    report = _dense_report(job) if state is None else report_of(state)
    for result in loop_of(job.config).run(job.session, since):
        record = _shot_record(result, job)
        memory = Memory(
            peak=max(report.memory.peak, record.peak),
            model=report.memory.model,
            factors=max(report.memory.factors, result.factor_bytes),
        )
        layers = tuple(_layer_records(job.anatomy, result.masks))
        report = report.model_copy(update={"shots": (*report.shots, record), "layers": layers, "memory": memory})
        state = replace(result.state, report=report)
        after_shot(state)
        state = _measured(job, state, after_shot)
        report = report_of(state)
    assert state is not None, "there is at least one shot"
    return state


def _measured(job: Job, state: RunState, after_shot: Callable[[RunState], None]) -> RunState:
    """Measure the model after the last shot of a report, unless that is done, and put the perplexity on record."""
    report, text = report_of(state), job.texts.evaluation
    last = report.shots[-1]
    if text is not None and last.perplexity is None:
        clock = Clock(job.session.device)
        with clock.phase("evaluation"):
            words = phase_name(last.shot, job.config.shots, "perplexity")
            measured = measure(job.model, text, job.session.progress, words, job.session.processes)
        (evaluation,) = clock.records()
        stages = *last.stages, evaluation.model_copy(update={"reports": True})
        last = last.model_copy(update={"perplexity": measured, "stages": stages})
        memory = report.memory.model_copy(update={"peak": max(report.memory.peak, last.peak)})
        report = report.model_copy(update={"shots": (*report.shots[:-1], last), "memory": memory})
        state = replace(state, report=report)
        after_shot(state)
    logger.info(
        "shot %d/%d: %.1f %% of the prunable weights left%s",
        last.shot,
        job.config.shots,
        100 * (1 - last.sparsity),
        f", perplexity {last.perplexity.perplexity:.2f}" if last.perplexity else "",
    )
    return state


def _dense_report(job: Job) -> PruneReport:
    """The report before the first shot."""
    model, text, session = job.model, job.texts.evaluation, job.session
    reset_peak(session.device)
    dense = measure(model, text, session.progress, "dense: perplexity", session.processes) if text else None
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
        memory=Memory(peak=peak_bytes(session.device), model=model_bytes, factors=0),
        versions=versions(),
        command=job.command,
        plan=job.plan,
        processes=session.processes.count,
        origin=origin_of(job.source, job.files),
    )


def _continued(since: RunState) -> RunState:
    """State of an earlier run, with the shot after which it continues in its report."""
    report = report_of(since)
    continued = *report.continued, since.shot
    return replace(since, report=report.model_copy(update={"continued": continued, "versions": versions()}))


def measure(
    model: PreTrainedModel, text: EvaluationText, progress: Progress, words: str, processes: Processes = ALONE
) -> Perplexity:
    """Measure perplexity, and show the progress of this process."""
    with progress.phase(words, len(processes.own(text.windows)) * text.stride) as phase:
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
        # Stored zeros do not count as parameters.
        size=Size(prunable=weights, total=parameters - (stored - weights)),
        threshold=result.threshold,
        structures_removed=result.removed,
        structures_implied=result.implied,
        loss=result.loss,
        stages=result.stages,
        costs=result.costs,
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
    """Number of parameters of a model, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
