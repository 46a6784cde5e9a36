"""The functions of the package: prune a model in memory or a checkpoint, plan a run, evaluate a model."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.data.texts import IN_MEMORY, Texts, corpus_of, evaluation_text
from llm_surgeon.errors import ConfigError, ModelError
from llm_surgeon.export.in_memory import save_as_pruned
from llm_surgeon.models.loading import resolve_device, resolve_source, source_files
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.models.trust import has_weights
from llm_surgeon.planning.foresee import warn_if_short
from llm_surgeon.planning.sizes import disk_bytes
from llm_surgeon.pruning.checkpoint import Checkpoint, tensors_of
from llm_surgeon.pruning.result import RunState
from llm_surgeon.recipe.config import Bos, PruneConfig
from llm_surgeon.recipe.grouping import flat
from llm_surgeon.records import Perplexity, Plan, PruneReport, RunRecord
from llm_surgeon.run.export import export_result, export_shot, smaller
from llm_surgeon.run.job import Job, measure, report_of, run_job
from llm_surgeon.run.opening import OpenedTexts, check_recipe, open_checkpoint, open_model
from llm_surgeon.run.recover import recover_in_run
from llm_surgeon.run.recovery_report import with_recovery
from llm_surgeon.run.run_directory import RunDirectory, run_directory
from llm_surgeon.session.given import (
    as_path,
    as_progress,
    as_recipe,
    check_model,
    check_modules,
    check_surroundings,
    check_tokenizer,
    ready,
)
from llm_surgeon.session.marks import Marks
from llm_surgeon.session.preconditions import check_positions, check_stored_type, check_tokens
from llm_surgeon.system.allocator import hand_back_freed_memory
from llm_surgeon.system.files import check_disk_space
from llm_surgeon.system.processes import ALONE, Processes, joined, own_device
from llm_surgeon.system.progress import Progress, SilentProgress
from llm_surgeon.system.torchrun import Place, own_place
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig | Mapping[str, Any] | None = None,
    *,
    texts: Sequence[str | Mapping[str, Any] | Sequence[Any]] | None = None,
    out: str | Path | None = None,
    progress: Progress | bool | None = None,
    source: str = "",
    **options: Any,
) -> PruneReport:
    """Prune a model in place, and export it if asked.

    ``prune(model, tokenizer, texts=[...], sparsity=0.2, progress=True)`` is a whole call. Afterwards
    ``model.save_pretrained`` writes files that transformers loads again; ``out`` writes the report and the model card
    as well, and checks the export. If an error stops a shot half-way, some layers are pruned and others are not: start
    again from the dense model. There are no checkpoints. ``prune_checkpoint`` makes them, as it can load its dense
    model again.

    Processes of torchrun that all call this function with the same model and recipe share the work. Each has the
    result.

    Args:
        model: A dense causal language model of a supported family.
        tokenizer: Tokenizer of the model.
        config: The recipe, or a mapping of its options. ``device`` and ``dtype`` have no effect: the model is pruned on
            its device and in its type.
        texts: Calibration texts in memory, a document each: strings, rows as of a .jsonl file, or lists of messages of
            a chat; None reads the text that the recipe names (``calibration``).
        out: Directory to export to, with the reload check of ``prune_checkpoint``; must not exist, or be empty.
        progress: Display of progress; True shows bars, or lines where there is no terminal; None shows nothing.
        source: Name of the model, for the report.
        **options: Options of the recipe by name, which take precedence over ``config``.

    Returns:
        The report. It has no speed, as the dense model is gone by then.

    Raises:
        UnsupportedModelError: If the model is not a causal language model of transformers, or its architecture has no
            entry.
        ConfigError: If the recipe is not valid or does not fit the model.
        DataError: If there is too little text.
        NonFiniteError: If activations, gradients or costs are not finite.
        NotPositiveDefiniteError: If a factor cannot be decomposed even with more damping.
        OutputError: If ``out`` cannot be used.
        ExportMismatchError: If the reloaded export does not compute the same as the model.
        ProcessError: If another process of the run is gone.
    """
    corpus = None if texts is None else corpus_of(texts)
    if corpus is not None:
        options = _with_texts(config, options)
    config, place = as_recipe(config, options), None if out is None else as_path(out)
    display = as_progress(progress)
    check_model(model)
    check_tokenizer(tokenizer)
    check_surroundings(model)
    check_modules(model, exported=place is not None)
    _check_in_memory(config, exported=place is not None)
    with joined(next(model.parameters()).device) as processes, ready(model):
        if place is None:
            job = open_model(model, tokenizer, config, display, source, processes, corpus)
            state = run_job(job)
            save_as_pruned(job.model, job.anatomy, smaller(state.masks))
            return report_of(state)
        with _directory(place, processes) as run:
            processes.from_first(lambda: _the(run).refuse_former())
            check_stored_type(model)
            job = open_model(model, tokenizer, config, display, source, processes, corpus)
            report = _prune_into(job, run, config)
            return processes.from_first(lambda: _the(run).finish(report))


def _with_texts(config: PruneConfig | Mapping[str, Any] | None, options: dict[str, Any]) -> dict[str, Any]:
    """Options with the calibration text's name for texts in memory.

    Raises:
        ConfigError: If a calibration text is named as well.
    """
    asked = config.model_fields_set if isinstance(config, PruneConfig) else flat(config or {})
    if "calibration" in {*asked, *options}:
        raise ConfigError("There are texts, and a calibration text is named as well.", "Give one of the two.")
    return options | {"calibration": IN_MEMORY}


def _check_in_memory(config: PruneConfig, *, exported: bool) -> None:
    """Refuse options that need a checkpoint.

    Raises:
        ConfigError: If there is one.
    """
    if config.device_memory is not None or config.host_memory is not None:
        raise ConfigError(
            "How much memory is left beside a model that is loaded already is not known.",
            "Use prune_checkpoint with device_memory and host_memory; here order='layer-major' is what saves memory.",
        )
    if config.weights == "streamed":
        raise ConfigError("The weights are where the model was loaded to.", "Use prune_checkpoint to stream them.")
    if config.recover_tokens is not None:
        raise ConfigError(
            "The training after the last shot loads the dense model anew, and here it is pruned in memory.",
            "Use prune_checkpoint, or leave recover_tokens out and call recover on the export.",
        )
    if config.export_shots and not exported:
        raise ConfigError("Shots are to be exported, but there is no place to export to.", "Give out='...'.")


@contextmanager
def _directory(out: Path, processes: Processes) -> Iterator[RunDirectory | None]:
    """Directory of the run for the first process, which writes for all; None for the other processes."""
    with run_directory(out) if processes.first else nullcontext(None) as run:
        yield run


def _the(run: RunDirectory | None) -> RunDirectory:
    assert run is not None, "only the first process writes"
    return run


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str = "demo",
    *,
    window: int = 1024,
    stride: int | None = None,
    max_tokens: int = 20_480,
    precision: str = "bfloat16",
    bos: Bos = "auto",
    progress: Progress | None = None,
) -> Perplexity:
    """Token perplexity of a model on a text.

    Args:
        model: A dense or pruned model.
        tokenizer: Tokenizer of the model.
        data: A hub data set id, a local file, or ``demo[:en|fr|es]``; of the demo text, the part that calibration never
            sees.
        window: Number of tokens per window.
        stride: Number of tokens between the beginnings of windows; None takes the window.
        max_tokens: Largest number of tokens of the text to use.
        precision: ``bfloat16`` or ``float32`` arithmetic.
        bos: Whether each window begins with the token that begins a text: ``auto`` (where the tokenizer puts one),
            ``always`` or ``never``.
        progress: Display of progress; None shows nothing.

    Raises:
        DataError: If the text cannot be read, is shorter than a window, or has tokens that the model does not know.
        ConfigError: If the stride exceeds the window, or the window the positions that the model has learned.
        UnsupportedModelError: If the model is not a causal language model of transformers.
    """
    check_model(model)
    check_tokenizer(tokenizer)
    check_positions(model.config, {"window": window})
    text = evaluation_text(
        tokenizer, data, window=window, stride=stride, max_tokens=max_tokens, precision=precision, bos=bos
    )
    check_tokens(model.config, [text.tokens])
    with ready(model):
        return measure(model, text, progress or SilentProgress(), "perplexity")


def plan(
    model: str | Path,
    config: PruneConfig | Mapping[str, Any] | None = None,
    probe: bool = False,
    processes: int = 1,
    **options: Any,
) -> Plan:
    """Plan the pruning of a checkpoint without loading its weights: its sizes, its memory and its time.

    Args:
        model: A local directory, a hub id, or ``demo``. Of a directory, configuration and tokenizer are enough.
        config: The recipe, or a mapping of its options.
        probe: Whether to load the model after all, and to time and measure one batch; for one process only.
        processes: Number of processes of this machine that are to share the run.
        **options: Options of the recipe by name, which take precedence over ``config``.

    Returns:
        Sizes, memory and seconds by phase, disk, and engines that load the result. The host's memory is for this
        process, in which the run is expected.

    Raises:
        SurgeonError: Errors of ``prune_checkpoint`` before it loads the model; with ``probe``, errors of a pass too.
    """
    model, config = str(model), as_recipe(config, options)
    if processes < 1:
        raise ConfigError(f"A run in {processes} processes cannot be planned.", "Give 1 or more.")
    if probe and processes > 1:
        raise ConfigError("A probe times a batch in one process.", "Plan without a probe, or for one process.")
    source = Path(resolve_source(model))
    if probe and source.is_dir() and not has_weights(source):
        raise ModelError(
            f"A probe loads the model, and {source} has no weights (*.safetensors).",
            "Plan without --probe, or give all files of the checkpoint.",
        )
    # These processes do not exist: only their number counts.
    Processes(count=processes).check_samples(config.samples, config.parts_of_text)
    device, opening = _planned_device(config, probe), open_checkpoint(model, config, weights=probe)
    if opening.config.target is not None:
        raise ConfigError(
            "What a latency comes to is only known once the model has been timed.",
            "Plan with --sparsity, or let prune find the sparsity.",
        )
    shared = Place(count=processes, local_count=processes)
    return opening.read_texts().plan(opening.config, device, probe, shared)


def _planned_device(config: PruneConfig, probe: bool) -> torch.device:
    """Device of a plan: for a GPU with so much memory, this machine need not have one.

    Raises:
        ConfigError: If the device does not exist here, and has to.
    """
    if not re.fullmatch(r"cuda(:\d+)?", config.device) or torch.cuda.is_available() or probe:
        return resolve_device(config.device)
    if config.device_memory is None:
        raise ConfigError(
            f"The device {config.device!r} cannot be used: there is no GPU here.",
            "Use --device cpu; or say how much memory the GPU has that the plan is for: --device-memory 24GiB.",
        )
    return torch.device(config.device)


def prune_checkpoint(
    model: str | Path,
    out: str | Path,
    config: PruneConfig | Mapping[str, Any] | None = None,
    *,
    progress: Progress | bool | None = None,
    command: str | None = None,
    **options: Any,
) -> PruneReport:
    """Prune a checkpoint, export it, check the export in a fresh process, and measure dense and pruned model.

    Checkpoints of the run are kept in a directory beside ``out``, see ``run_directory``. However the process ends, the
    same call continues after the last complete shot or, in a shot of minutes, from the last state that was kept inside
    it. After an error there is nothing at ``out``.

    Args:
        model: A local directory, a hub id, or ``demo``.
        out: The directory to make; must not exist, or be empty.
        config: The recipe, or a mapping of its options.
        progress: Display of progress; True shows bars, or lines where there is no terminal; None shows nothing.
        command: The command line, for the report.
        **options: Options of the recipe by name, which take precedence over ``config``.

    Raises:
        OutputError: If ``out`` cannot be used, another process works on it, or the run to continue was begun with
            another recipe, model or text.
        DiskSpaceError: If the disk is too full, or becomes too full.
        ExportMismatchError: If the reloaded export does not compute the same as the model.
        ProcessError: If another process of the run is gone.
        SurgeonError: Errors of ``prune``.
    """
    model, out, config = str(model), as_path(out), as_recipe(config, options)
    display = as_progress(progress)
    check_recipe(config, ALONE)
    device = resolve_device(own_device(config.device))
    with joined(device) as processes, _directory(out, processes) as run:
        opening = open_checkpoint(model, config, processes)
        skeleton, resolved = opening.skeleton, opening.config
        files = source_files(skeleton.source, skeleton.network.config)

        def finished() -> PruneReport | None:
            _the(run).expect({"files": files, "recipe": config.resolved()})
            former = _the(run).finished
            if former is None:
                check_disk_space(out, disk_bytes(skeleton, resolved) - _the(run).nbytes)
            return None if former is None else _the(run).finish(former)

        done = processes.from_first(finished)
        if done is not None:
            return done
        # The models of this call are out of memory when the training loads its own.
        report = _exported(opening.read_texts(), run, config, device, files, display, command)
        if config.recover_tokens is not None:
            path = processes.from_first(lambda: _the(run).path)
            hand_back_freed_memory()
            trained = recover_in_run(
                path / "export", path / "recovery", out, skeleton.source, config, processes, device, display
            )
            report = report if trained is None else with_recovery(report, trained)
        return processes.from_first(lambda: _the(run).finish(report))


def _exported(
    opened: OpenedTexts,
    run: RunDirectory | None,
    asked: PruneConfig,
    device: torch.device,
    files: dict[str, str],
    display: Progress | None,
    command: str | None,
) -> PruneReport:
    """Prune a checkpoint whose texts have been read, and export it within the run's directory.

    Args:
        opened: The checkpoint.
        run: Directory of the run; None in other processes than the first.
        asked: The recipe as it was given.
        device: Device of this process.
        files: Marks of the checkpoint's files.
        display: Display of progress.
        command: The command line, for the report.
    """
    opening = opened.opening
    skeleton, resolved, processes = opening.skeleton, opening.config, opening.processes
    resolved, former = processes.from_first(lambda: _begun(_the(run), resolved, opened.texts))
    foreseen = None
    # The sparsity of a latency is only known once the model has been timed.
    if resolved.target is None:
        foreseen = processes.from_first(lambda: opened.plan(resolved, device, place=own_place()))
        if processes.first:
            warn_if_short(foreseen)
    job = opened.load(resolved, device, display, foreseen, command)
    record = RunRecord(
        model=opening.model,
        files=files,
        recipe=asked.resolved(),
        texts=opened.texts.digest,
        circumstances=_circumstances(job),
        sparsity=job.config.sparsity if asked.target == "target_latency" else None,
    )
    processes.from_first(lambda: _the(run).begin(record, job.config))
    directory, held = processes.from_first(lambda: (_the(run).path, _the(run).nbytes))
    marks = Marks(directory, max(0, disk_bytes(skeleton, resolved) - held), processes)
    job = replace(job, session=replace(job.session, marks=marks))
    return _prune_into(job, run, asked, dense=skeleton.source, record=record, former=former)


def _begun(run: RunDirectory, config: PruneConfig, texts: Texts) -> tuple[PruneConfig, Checkpoint | None]:
    """The recipe as resolved when the run was begun, without measuring again, and the newest checkpoint.

    Raises:
        OutputError: If the run was begun with other texts.
    """
    run.expect({"texts": texts.digest})
    checkpoint, former = run.checkpoints.newest_whole(), run.former
    if former is not None:
        if former.sparsity is not None:
            config = config.at(former.sparsity)
        # The order decides the last bits of the sums, and other free memory must not change it.
        if config.order == "auto":
            config = config.model_copy(update={"order": former.circumstances.get("order", "auto")})
    return config, checkpoint


def _circumstances(job: Job) -> dict[str, str]:
    """Circumstances beside the recipe on which the last bits of the weights depend."""
    return versions() | {
        "device": job.session.device.type,
        "threads": str(torch.get_num_threads()),
        "processes": str(job.session.processes.count),
        "order": job.plan.order if job.plan else job.config.order,
    }


def _prune_into(
    job: Job,
    run: RunDirectory | None,
    asked: PruneConfig,
    dense: str | None = None,
    record: RunRecord | None = None,
    former: Checkpoint | None = None,
) -> PruneReport:
    """Prune, and export within the run's directory; the first process writes for all.

    Args:
        job: The run, whose model is dense.
        run: Directory of the run; None in other processes than the first.
        asked: The recipe as it was given.
        dense: Source of the dense model to time the result against; None does not time it.
        record: Record for the checkpoints; None makes no checkpoints.
        former: The checkpoint to continue after; None begins with the first shot.
    """
    processes = job.session.processes

    def keep(state: RunState) -> None:
        report = report_of(state)
        checkpoint = None if record is None else Checkpoint(run=record, report=report)
        if checkpoint is not None and checkpoint.shot in _the(run).checkpoints.shots():
            _the(run).checkpoints.amend(checkpoint)
        elif checkpoint is not None:
            tensors = tensors_of(job.model, job.anatomy, state, job.config)
            _the(run).checkpoints.write(checkpoint, tensors)
            job.session.marks.clear()
        if job.texts.evaluation is None or report.shots[-1].perplexity is not None:
            export_shot(job, _the(run), state)

    since = None
    if former is not None:
        logger.info("continuing after shot %d of %d", former.shot, job.config.shots)
        checkpoints = processes.from_first(lambda: _the(run).checkpoints)
        since = replace(checkpoints.restore(former.shot, job.model, job.anatomy), report=former.report)
        if job.texts.evaluation is None or former.report.shots[-1].perplexity is not None:
            # The earlier process may have ended between checkpoint and export.
            processes.from_first(lambda: export_shot(job, _the(run), since))
    state = run_job(job, lambda state: processes.from_first(lambda: keep(state)), since)
    save_as_pruned(job.model, job.anatomy, smaller(state.masks))
    # Timing makes sense only for smaller matrices, as zeros take as long to multiply by as any number, and only for
    # resident weights, as streamed weights take as long as the disk does.
    resident = weights_of(job.model).blocks is None
    timed = dense if resident and smaller(state.masks) else None

    def export() -> PruneReport:
        there = _the(run)
        return export_result(job, state, there.export, there.out, timed, asked)

    return processes.from_first(export)
