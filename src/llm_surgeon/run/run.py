"""A whole run: what is checked before, the shots, what is measured, and the export."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.data.texts import Texts, evaluation_text, prepare_texts
from llm_surgeon.errors import ConfigError
from llm_surgeon.evaluation.limits import speed_limits
from llm_surgeon.evaluation.speed import compare_speed
from llm_surgeon.export.save import save_model, weight_bytes
from llm_surgeon.export.verify import verify_export
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.classes import check_class
from llm_surgeon.models.loading import (
    load_model,
    load_tokenizer,
    local_directory,
    resolve_device,
    resolve_source,
    source_files,
)
from llm_surgeon.models.skeleton import Skeleton, loaded, skeleton_of
from llm_surgeon.models.streaming import require_streaming, weights_of
from llm_surgeon.planning.plan import foresee, warn_if_short
from llm_surgeon.planning.sizes import SMALL_FILES, disk_bytes
from llm_surgeon.pruning import targets
from llm_surgeon.pruning.checkpoint import Checkpoint, tensors_of
from llm_surgeon.pruning.structures import Masks, check_structure
from llm_surgeon.pruning.targets import count_based, latency_based, settled
from llm_surgeon.recipe.config import Bos, PruneConfig
from llm_surgeon.records import (
    ExportRecord,
    Perplexity,
    PruneReport,
    RunRecord,
    SpeedComparison,
)
from llm_surgeon.refit.lora import require_peft
from llm_surgeon.refit.reconstruction import goal_of
from llm_surgeon.report.card import model_card
from llm_surgeon.report.page import report_page
from llm_surgeon.report.plan import seconds_of_phases
from llm_surgeon.report.plots import kept_fraction_png
from llm_surgeon.report.publish import recipe_without_paths, without_paths
from llm_surgeon.run.job import Job, Reached, count_parameters, measure, run_job
from llm_surgeon.run.run_directory import RunDirectory, run_directory
from llm_surgeon.session.given import (
    as_path,
    as_recipe,
    check_layers_apart,
    check_model,
    check_modules,
    check_surroundings,
    check_tokenizer,
    ready,
)
from llm_surgeon.session.preconditions import (
    check_positions,
    check_recipe_fits,
    check_stored_type,
    check_texts,
    check_tokens,
    warn_of_tokenizer,
    warn_of_unknown,
)
from llm_surgeon.system.allocator import hand_back_freed_memory
from llm_surgeon.system.files import PARTIAL, check_disk_space, flush, readable_as_others, writing
from llm_surgeon.system.processes import Processes, joined, own_device
from llm_surgeon.system.progress import Progress, SilentProgress, expect
from llm_surgeon.system.torchrun import own_place
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)

_PROMPT, _GENERATED = 512, 32


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    source: str = "",
) -> PruneReport:
    """Prune a model in place, and export it if asked.

    The model's layers are smaller afterwards; ``save_pretrained`` alone does not describe them, ``out`` does. If an
    error stops a shot half-way, some layers are pruned and others are not: start again from the dense model. There are
    no checkpoints; ``prune_checkpoint`` makes them, as what it begins with can be loaded again.

    Processes of torchrun that all call it with the same model and recipe share the work, and each has the result.

    Args:
        model: A dense causal language model of a supported family.
        tokenizer: Its tokenizer.
        config: The recipe, or a mapping of its options; its ``device`` and ``dtype`` are of use when a checkpoint is
            loaded, not here: the model is pruned where it is and as it is.
        out: Directory to export to, with the reload check of ``prune_checkpoint``; must not exist, or be empty.
        progress: Where progress is shown; nowhere if None.
        source: The model's name, for the report.

    Returns:
        What was measured. Speed is not: the dense model is gone by then.

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
    config, place = as_recipe(config), None if out is None else as_path(out)
    check_model(model)
    check_tokenizer(tokenizer)
    check_surroundings(model)
    check_modules(model, exported=place is not None)
    if config.device_memory is not None or config.host_memory is not None:
        raise ConfigError(
            "How much memory is left beside a model that is loaded already is not known.",
            "Use prune_checkpoint with device_memory and host_memory; here order='layer-major' is what saves memory.",
        )
    if config.weights == "streamed":
        raise ConfigError("The weights are where the model was loaded to.", "Use prune_checkpoint to stream them.")
    if place is None and config.export_shots:
        raise ConfigError("Shots are to be exported, but there is no place to export to.", "Give out='...'.")
    with joined(next(model.parameters()).device) as processes, ready(model):
        if place is None:
            return run_job(_job_in_memory(model, tokenizer, config, progress, source, processes)).report
        with _directory(place, processes) as run:
            processes.from_first(lambda: _the(run).refuse_former())
            check_stored_type(model)
            return _prune_into(_job_in_memory(model, tokenizer, config, progress, source, processes), run, config)


def _job_in_memory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig,
    progress: Progress | None,
    source: str,
    processes: Processes,
) -> Job:
    """What ``prune`` works on, once all is checked that can be."""
    if config.lora:
        require_peft()
    processes.check_samples(config.samples, config.parts_of_text)
    family = family_of(model.config.model_type)
    check_class(model, family.model_class)
    check_recipe_fits(config, model.config)
    anatomy = examine(model, family, config.ignore)
    check_layers_apart(model, anatomy)
    resolved = count_based(config, anatomy, count_parameters(model), model.dtype.itemsize)
    check_structure(resolved, anatomy)
    texts = prepare_texts(tokenizer, config)
    check_texts(model.config, texts)
    resolved = processes.from_first(partial(latency_based, resolved, model, anatomy))
    check_structure(resolved, anatomy)
    name = source or model.config.name_or_path or type(model).__name__
    dense = goal_of(model, anatomy, texts.calibration, resolved)
    shown = _shown(progress, processes)
    return Job(model, tokenizer, anatomy, texts, resolved, shown, name, processes=processes, dense=dense)


def _shown(progress: Progress | None, processes: Processes) -> Progress:
    """Progress where it is wanted, and in the first process only: that of the others is much the same."""
    return progress if progress is not None and processes.first else SilentProgress()


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


def prune_checkpoint(
    model: str | Path,
    out: str | Path,
    config: PruneConfig | Mapping[str, Any],
    *,
    progress: Progress | None = None,
    command: str | None = None,
) -> PruneReport:
    """Prune a checkpoint, export it, check the export in a fresh process, and measure both.

    What the run needs to go on after a shot is kept in a directory beside ``out``, see ``run_directory``: however the
    process ends, the same call continues after the last shot that was complete. Whatever fails, nothing is left at
    ``out``.

    Args:
        model: A local directory, a hub id, or ``demo``.
        out: The directory to make; must not exist, or be empty.
        config: The recipe, or a mapping of its options.
        progress: Where progress is shown; nowhere if None.
        command: The command line, for the report.

    Raises:
        OutputError: If ``out`` cannot be used, another process works on it, or what is there to be continued was
            begun with another recipe, model or text.
        DiskSpaceError: If the disk is too full, or gets so.
        ExportMismatchError: If the reloaded export computes something else.
        ProcessError: If another process of the run is gone.
        SurgeonError: Whatever ``prune`` raises.
    """
    model, out, config = str(model), as_path(out), as_recipe(config)
    if config.lora:
        require_peft()
    require_streaming(config.weights)
    device = resolve_device(own_device(config.device))
    with joined(device) as processes, _directory(out, processes) as run:
        processes.check_samples(config.samples, config.parts_of_text)
        _announce(processes, f"reading the configuration of {model}")
        skeleton = skeleton_of(resolve_source(model), config)
        check_recipe_fits(config, skeleton.network.config)
        resolved = settled(skeleton, config)
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
        _announce(processes, "reading and tokenising the texts")
        tokenizer = load_tokenizer(skeleton.source, config.trust_remote_code)
        warn_of_tokenizer(skeleton.network.config, tokenizer)
        texts = prepare_texts(tokenizer, config)
        check_texts(skeleton.network.config, texts)
        warn_of_unknown(tokenizer, texts)
        resolved, former = processes.from_first(lambda: _begun(_the(run), resolved, texts))
        job = _loaded_job(model, skeleton, tokenizer, texts, resolved, device, progress, command, processes)
        record = RunRecord(
            model=model,
            files=files,
            recipe=config.resolved(),
            texts=texts.digest,
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


def _loaded_job(
    model: str,
    skeleton: Skeleton,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    config: PruneConfig,
    device: torch.device,
    progress: Progress | None,
    command: str | None,
    processes: Processes,
) -> Job:
    """Load the model that everything has been checked for."""
    foreseen = None
    # What a latency comes to is only known once the model has been timed.
    if config.target is None:
        _announce(processes, "planning the run")
        foreseen = processes.from_first(lambda: foresee(model, skeleton, config, device, texts, place=own_place()))
        if processes.first:
            warn_if_short(foreseen)
    streamed = foreseen.streamed if foreseen else config.weights == "streamed"
    _announce(processes, "loading the weights")
    network, anatomy = loaded(skeleton, config, device, streamed=streamed)
    check_stored_type(network)
    config = processes.from_first(partial(latency_based, config, network, anatomy))
    check_structure(config, anatomy)
    shown = _shown(progress, processes)
    if foreseen is not None:
        expect(shown, seconds_of_phases(foreseen, config))
    # Before a checkpoint is restored into the model.
    dense = goal_of(network, anatomy, texts.calibration, config)
    files = local_directory(skeleton.source)
    return Job(network, tokenizer, anatomy, texts, config, shown, model, command, foreseen, processes, dense, files)


def _announce(processes: Processes, what: str) -> None:
    """Say what is being done while nothing can be counted."""
    if processes.first:
        logger.info(what)


def _circumstances(job: Job) -> dict[str, str]:
    """What the last bits of the weights depend on beside the recipe."""
    return versions() | {
        "device": next(job.model.parameters()).device.type,
        "threads": str(torch.get_num_threads()),
        "processes": str(job.processes.count),
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
    processes = job.processes

    def keep(reached: Reached) -> None:
        checkpoint = None if record is None else Checkpoint(run=record, report=reached.report)
        if checkpoint is not None and checkpoint.shot in _the(run).checkpoints.shots():
            _the(run).checkpoints.amend(checkpoint)
        elif checkpoint is not None:
            tensors = tensors_of(job.model, job.anatomy, reached.standing, job.config)
            _the(run).checkpoints.write(checkpoint, tensors)
            weights_of(job.model).forget()
        if job.texts.evaluation is None or reached.report.shots[-1].perplexity is not None:
            _export_shot(job, _the(run), reached)

    since = None
    if former is not None:
        logger.info("continuing after shot %d of %d", former.shot, job.config.shots)
        checkpoints = processes.from_first(lambda: _the(run).checkpoints)
        since = Reached(former.report, checkpoints.restore(former.shot, job.model, job.anatomy))
        if job.texts.evaluation is None or former.report.shots[-1].perplexity is not None:
            # It may have been ended between checkpoint and export.
            processes.from_first(lambda: _export_shot(job, _the(run), since))
    reached = run_job(job, lambda reached: processes.from_first(lambda: keep(reached)), since)
    # Zeros in matrices of the old shape take as long to multiply by as any number, and weights that come from a disk
    # as long as the disk takes.
    resident = weights_of(job.model).blocks is None
    timed = dense if resident and _smaller(reached.standing.masks) else None

    def finish() -> PruneReport:
        there = _the(run)
        return there.finish(_export(job, reached, there.export, there.out, timed, asked))

    return processes.from_first(finish)


def _export_shot(job: Job, run: RunDirectory, reached: Reached) -> None:
    """Export a shot that is to be exported as well, unless that was done before; the last one is the result."""
    shot = reached.standing.shot
    directory = run.export / f"shot-{shot}"
    if shot in job.config.export_shots and shot < job.config.shots and not directory.exists():
        beside = directory.with_name(f"{directory.name}{PARTIAL}")
        _export(job, reached, beside, run.out / directory.name)
        flush(beside)
        beside.rename(directory)


def _export(
    job: Job,
    reached: Reached,
    directory: Path,
    place: Path,
    dense: str | None = None,
    asked: PruneConfig | None = None,
) -> PruneReport:
    """Write the model as it is, check it and time it.

    Args:
        job: What was worked on.
        reached: What is left, and what is known so far.
        directory: Where to write.
        place: Where the directory will be in the end.
        dense: What to time the result against.
        asked: The recipe as it was given, if this is its result.
    """
    logger.info("writing the export and reloading it in a fresh process")
    report, keep = reached.report, _smaller(reached.standing.masks)
    with writing(directory, sum(parameter.nbytes for parameter in job.model.parameters())):
        directory.mkdir(parents=True, exist_ok=True)
        form = save_model(job.model, job.tokenizer, job.anatomy, keep, directory, job.files)
        readable_as_others(directory)
        # The model is about to be there once or twice more, in the reload check and for speed.
        hand_back_freed_memory()
        check = verify_export(job.model, directory, form.plain)
    export = ExportRecord(
        path=str(place),
        weight_bytes=weight_bytes(directory),
        dense_weight_bytes=report.memory.model,
        max_logit_difference=check.difference,
        logit_scale=check.scale,
        plain=form.plain,
    )
    speed = _compare_speed(dense, job, keep) if dense is not None else None
    parameters = report.shots[-1].size.total
    target = None if asked is None else targets.reached(asked, job.model, parameters, export.weight_bytes)
    report = report.model_copy(update={"export": export, "speed": speed, "target": target})
    with writing(directory, SMALL_FILES):
        _write_report(report, job.config, directory)
    return report


def _smaller(masks: Masks) -> dict[str, KeepMask] | None:
    """The masks if the matrices have shrunk; None if there are zeros in matrices of the old shape."""
    shrunk = {name: mask for name, mask in masks.items() if isinstance(mask, KeepMask)}
    return shrunk or None


def _compare_speed(source: str, job: Job, keep: Mapping[str, KeepMask] | None) -> SpeedComparison:
    """Time the dense model, loaded once more, against the pruned one."""
    logger.info("measuring the speed of the dense and the pruned model")
    device = next(job.model.parameters()).device
    dense = load_model(source, job.config.dtype, device, job.config.trust_remote_code)
    longest = getattr(dense.config, "max_position_embeddings", None) or _PROMPT + _GENERATED
    generate = min(_GENERATED, max(1, longest // 4))
    prompt = min(_PROMPT, longest - generate)
    measured = compare_speed(dense, job.model, prompt=prompt, generate=generate)
    if keep is None:
        return measured
    head_weights = job.model.get_output_embeddings().weight.numel()
    prefill, decode = speed_limits(job.anatomy, keep, head_weights, prompt)
    return measured.model_copy(update={"prefill_limit": prefill, "decode_limit": decode})


def _write_report(report: PruneReport, config: PruneConfig, directory: Path) -> None:
    report = without_paths(report)
    (directory / "report.json").write_text(report.model_dump_json(indent=2) + "\n", encoding="utf8")
    (directory / "recipe.yaml").write_text(recipe_without_paths(config), encoding="utf8")
    (directory / "README.md").write_text(model_card(report), encoding="utf8")
    (directory / "report.html").write_text(report_page(report), encoding="utf8")
    kept_fraction_png(report, directory / "kept_fraction.png")
