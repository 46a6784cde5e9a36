"""Runs as people call them: prune a model in memory or a checkpoint, plan a run, evaluate a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.data.texts import IN_MEMORY, Texts, corpus_of, evaluation_text
from llm_surgeon.errors import ConfigError
from llm_surgeon.export.in_memory import save_as_pruned
from llm_surgeon.models.loading import resolve_device, source_files
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.planning.plan import warn_if_short
from llm_surgeon.planning.sizes import disk_bytes
from llm_surgeon.pruning.checkpoint import Checkpoint, tensors_of
from llm_surgeon.pruning.result import RunState
from llm_surgeon.recipe.config import Bos, PruneConfig
from llm_surgeon.recipe.grouping import flat
from llm_surgeon.records import Perplexity, Plan, PruneReport, RunRecord
from llm_surgeon.run.export import export_result, export_shot, smaller
from llm_surgeon.run.job import Job, measure, report_of, run_job
from llm_surgeon.run.opening import check_recipe, open_checkpoint, open_model
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
from llm_surgeon.session.preconditions import check_positions, check_stored_type, check_tokens
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
    texts: Sequence[str] | None = None,
    out: str | Path | None = None,
    progress: Progress | bool | None = None,
    source: str = "",
    **options: Any,
) -> PruneReport:
    """Prune a model in place, and export it if asked.

    ``prune(model, tokenizer, texts=[...], sparsity=0.2, progress=True)`` is a whole call. Afterwards
    ``model.save_pretrained`` writes what transformers loads again; ``out`` writes the report and the model card as
    well, and checks the export. If an error stops a shot half-way, some layers are pruned and others are not: start
    again from the dense model. There are no checkpoints; ``prune_checkpoint`` makes them, as what it begins with can
    be loaded again.

    Processes of torchrun that all call it with the same model and recipe share the work, and each has the result.

    Args:
        model: A dense causal language model of a supported family.
        tokenizer: Its tokenizer.
        config: The recipe, or a mapping of its options; its ``device`` and ``dtype`` are of use when a checkpoint is
            loaded, not here: the model is pruned where it is and as it is.
        texts: Calibration texts in memory, a document each; None reads the text that the recipe names
            (``calibration``).
        out: Directory to export to, with the reload check of ``prune_checkpoint``; must not exist, or be empty.
        progress: Display of progress; True shows bars, or lines where there is no terminal.
        source: Name of the model, for the report.
        **options: Options of the recipe by name, which go before those of ``config``.

    Returns:
        The report of the run. Speed is not in it: the dense model is gone by then.

    Raises:
        UnsupportedModelError: If the model is none of transformers' causal language models, or there is no entry for
            its architecture.
        ConfigError: If the recipe is not valid or does not fit the model.
        DataError: If there is too little text.
        NonFiniteError: If activations, gradients or costs are not finite.
        NotPositiveDefiniteError: If a factor cannot be decomposed even with more damping.
        OutputError: If ``out`` cannot be used.
        ExportMismatchError: If the reloaded export computes something else.
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
            return _prune_into(job, run, config)


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
    if config.export_shots and not exported:
        raise ConfigError("Shots are to be exported, but there is no place to export to.", "Give out='...'.")


@contextmanager
def _directory(out: Path, processes: Processes) -> Iterator[RunDirectory | None]:
    """The directory of the run, for the first process, which writes for all; None for the others."""
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
        model: Dense or pruned.
        tokenizer: Its tokenizer.
        data: A hub data set id, a local file, or ``demo[:en|fr|es]``, of which the part that calibration never sees
            is taken.
        window: Tokens per window.
        stride: Tokens between windows; the window if None.
        max_tokens: Tokens of the text that are used, at most.
        precision: ``bfloat16`` or ``float32``.
        bos: Whether each window begins with the token that begins a text: ``auto`` (where the tokenizer puts one),
            ``always`` or ``never``.
        progress: Where progress is shown; nowhere if None.

    Raises:
        DataError: If the text cannot be read, is shorter than a window, or has tokens that the model does not know.
        ConfigError: If the stride exceeds the window, or the window the positions that the model has learned.
        UnsupportedModelError: If the model is none of transformers' causal language models.
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
    """Say what pruning a checkpoint will take and give, without loading its weights.

    Args:
        model: A local directory, a hub id, or ``demo``.
        config: The recipe, or a mapping of its options.
        probe: Whether to load the model after all, and to time and measure one batch; for one process.
        processes: How many of this machine are to share the run.
        **options: Options of the recipe by name, which go before those of ``config``.

    Returns:
        Sizes, memory and seconds by phase, disk, and engines that load the result. Memory of the host is that of this
        process, in which the run is expected.

    Raises:
        SurgeonError: Whatever ``prune_checkpoint`` raises before it loads the model; ``probe`` raises what a pass does.
    """
    model, config = str(model), as_recipe(config, options)
    if processes < 1:
        raise ConfigError(f"A run in {processes} processes cannot be planned.", "Give 1 or more.")
    if probe and processes > 1:
        raise ConfigError("A probe times a batch in one process.", "Plan without a probe, or for one process.")
    # Not joined with any: they share in numbers only.
    Processes(count=processes).check_samples(config.samples, config.parts_of_text)
    device, opening = resolve_device(config.device), open_checkpoint(model, config)
    if opening.config.target is not None:
        raise ConfigError(
            "What a latency comes to is only known once the model has been timed.",
            "Plan with --sparsity, or let prune find the sparsity.",
        )
    shared = Place(count=processes, local_count=processes)
    return opening.read_texts().plan(opening.config, device, probe, shared)


def prune_checkpoint(
    model: str | Path,
    out: str | Path,
    config: PruneConfig | Mapping[str, Any] | None = None,
    *,
    progress: Progress | bool | None = None,
    command: str | None = None,
    **options: Any,
) -> PruneReport:
    """Prune a checkpoint, export it, check the export in a fresh process, and measure both.

    What the run needs to go on after a shot is kept in a directory beside ``out``, see ``run_directory``: however the
    process ends, the same call continues after the last shot that was complete. Whatever fails, nothing is left at
    ``out``.

    Args:
        model: A local directory, a hub id, or ``demo``.
        out: The directory to make; must not exist, or be empty.
        config: The recipe, or a mapping of its options.
        progress: Display of progress; True shows bars, or lines where there is no terminal.
        command: The command line, for the report.
        **options: Options of the recipe by name, which go before those of ``config``.

    Raises:
        OutputError: If ``out`` cannot be used, another process works on it, or what is there to be continued was
            begun with another recipe, model or text.
        DiskSpaceError: If the disk is too full, or gets so.
        ExportMismatchError: If the reloaded export computes something else.
        ProcessError: If another process of the run is gone.
        SurgeonError: Whatever ``prune`` raises.
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
        opened = opening.read_texts()
        resolved, former = processes.from_first(lambda: _begun(_the(run), resolved, opened.texts))
        foreseen = None
        # The sparsity of a latency is only known once the model has been timed.
        if resolved.target is None:
            foreseen = processes.from_first(lambda: opened.plan(resolved, device, place=own_place()))
            if processes.first:
                warn_if_short(foreseen)
        job = opened.load(resolved, device, display, foreseen, command)
        record = RunRecord(
            model=model,
            files=files,
            recipe=config.resolved(),
            texts=opened.texts.digest,
            circumstances=_circumstances(job),
            sparsity=job.config.sparsity if config.target == "target_latency" else None,
        )
        processes.from_first(lambda: _the(run).begin(record, job.config))
        return _prune_into(job, run, config, dense=skeleton.source, record=record, former=former)


def _begun(run: RunDirectory, config: PruneConfig, texts: Texts) -> tuple[PruneConfig, Checkpoint | None]:
    """The recipe as it came out when the run was begun, and how far it came; what was measured is not measured again.

    Raises:
        OutputError: If the run was begun with other texts.
    """
    run.expect({"texts": texts.digest})
    checkpoint, former = run.checkpoints.newest_whole(), run.former
    if former is not None:
        if former.sparsity is not None:
            config = config.at(former.sparsity)
        # What the memory had room for decides the last bits of the sums.
        if config.order == "auto":
            config = config.model_copy(update={"order": former.circumstances.get("order", "auto")})
    return config, checkpoint


def _circumstances(job: Job) -> dict[str, str]:
    """Circumstances on which the last bits of the weights depend beside the recipe."""
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
    """Prune, and export within the run's directory before moving that to its place; the first process does, for all.

    Args:
        job: What to work on; its model is dense.
        run: Where; None in other processes than the first.
        asked: The recipe as it was given.
        dense: What to time the result against.
        record: For the checkpoints; None makes none.
        former: The checkpoint to continue after.
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
            weights_of(job.model).forget()
        if job.texts.evaluation is None or report.shots[-1].perplexity is not None:
            export_shot(job, _the(run), state)

    since = None
    if former is not None:
        logger.info("continuing after shot %d of %d", former.shot, job.config.shots)
        checkpoints = processes.from_first(lambda: _the(run).checkpoints)
        since = replace(checkpoints.restore(former.shot, job.model, job.anatomy), report=former.report)
        if job.texts.evaluation is None or former.report.shots[-1].perplexity is not None:
            # It may have been ended between checkpoint and export.
            processes.from_first(lambda: export_shot(job, _the(run), since))
    state = run_job(job, lambda state: processes.from_first(lambda: keep(state)), since)
    save_as_pruned(job.model, job.anatomy, smaller(state.masks))
    # Zeros in matrices of the old shape take as long to multiply by as any number, and weights that come from a disk
    # as long as the disk takes.
    resident = weights_of(job.model).blocks is None
    timed = dense if resident and smaller(state.masks) else None

    def finish() -> PruneReport:
        there = _the(run)
        return there.finish(export_result(job, state, there.export, there.out, timed, asked))

    return processes.from_first(finish)
