"""Recovery of an export: training after pruning, on the dense model's predictions or on text alone."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm_surgeon.errors import (
    ConfigError,
    ExportMismatchError,
    NonFiniteError,
    OutputError,
    ProcessError,
    RecoveryError,
    SurgeonError,
)
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.models import pruned_family_of
from llm_surgeon.models.loading import load_model, resolve_device
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.recovery import OF_TEACHERS, RecoverConfig
from llm_surgeon.records import Perplexity, RecoveryRecord, RecoverySource
from llm_surgeon.recovery.objective import Student, Teacher
from llm_surgeon.recovery.opening import Work, check_same_everywhere, opened
from llm_surgeon.recovery.preparing import as_trained, recompute_activations
from llm_surgeon.recovery.sharding import share_out, together, whole
from llm_surgeon.recovery.states import States
from llm_surgeon.recovery.training import Standing, Training
from llm_surgeon.recovery.writing import take, write_recovered
from llm_surgeon.report.publish import recovery_without_paths
from llm_surgeon.run.job import count_parameters
from llm_surgeon.run.opening import shown_in_first
from llm_surgeon.run.recovery_directory import RECORD, begin, recovery_directory
from llm_surgeon.run.recovery_report import describe
from llm_surgeon.session.given import as_path, as_progress, check_model
from llm_surgeon.system.files import check_output, flush, sync, writing
from llm_surgeon.system.memory import peak_bytes, reset_peak
from llm_surgeon.system.processes import Processes, joined, own_device
from llm_surgeon.system.progress import Progress
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)

# Bytes of the record, and of report, page and card, at most.
_WORDS = 2**24


def recover(
    model: str | Path,
    out: str | Path,
    config: RecoverConfig | Mapping[str, Any] | None = None,
    *,
    teacher: str | Path | None = None,
    progress: Progress | bool | None = None,
    command: str | None = None,
    **options: Any,
) -> RecoveryRecord:
    """Train an export on the predictions of its dense model, or on text alone; shapes and zeros stay as they are.

    States of the training are kept in ``OUT.run`` beside ``out``. However the process ends, the same call goes on: on
    one process of a CPU, with the same versions and threads, to the last bit. The result has the weights after which
    held-out perplexity was lowest.

    Processes of torchrun share the sequences of each step, and the weights of both models (FSDP2).

    Args:
        model: An export, or another checkpoint of a supported architecture: a directory, a hub id, or ``demo``.
        out: The directory to make; must not exist, or be empty.
        config: The recipe, or a mapping of its options.
        teacher: The dense model; None trains on the text's own next tokens.
        progress: Display of progress; True shows bars, or lines where there is no terminal; None shows nothing.
        command: The command line, for the record.
        **options: Options of the recipe by name, which take precedence over ``config``.

    Returns:
        The record, with the curves.

    Raises:
        RecoveryError: If no evaluation finds a lower perplexity than before the training.
        NonFiniteError: If a loss is not finite, and no evaluation before has found a lower perplexity.
        OutputError: If ``out`` cannot be used, or a recovery was begun there with something else.
        DiskSpaceError: If the disk is too full.
        ConfigError: If the recipe is not valid, the teacher has other tokens, or the memory does not suffice.
        ModelError: If a model cannot be loaded.
        DataError: If a text cannot be read.
    """
    given = config.model_dump(exclude_unset=True) if isinstance(config, RecoverConfig) else dict(config or {})
    recipe, out = RecoverConfig.from_mapping(given | options), Path(os.path.abspath(as_path(out)))
    if teacher is None:
        _check_idle(recipe)
    device, display = resolve_device(own_device(recipe.device)), as_progress(progress)
    dense = None if teacher is None else str(teacher)
    with joined(device) as processes, recovery_directory(out, processes) as directory:
        work = opened(str(model), dense, recipe, processes, device, shown_in_first(display, processes))
        check_same_everywhere(work)
        done = processes.from_first(lambda: begin(work, out, directory))
        if done is not None:
            return done
        record = _trained(work, directory, command)

        def put_in_place() -> None:
            export = directory / "export"
            with writing(export, _WORDS):
                _describe(record, export)
                flush(export)
            check_output(out)
            with writing(out, _WORDS):
                os.replace(export, out)
                sync(out.parent)

        processes.from_first(put_in_place)
        return record


def recover_in_run(
    export: Path,
    directory: Path,
    out: Path,
    model: str,
    config: PruneConfig,
    processes: Processes,
    device: torch.device,
    progress: Progress | None,
) -> RecoveryRecord | None:
    """Train the export of a run, before it is moved to its place, on the run's texts; the result replaces its files.

    If the training fails or does not help, the export stays as it was pruned, and this is logged.

    Args:
        export: The export, complete and checked.
        directory: Directory for the states of the training; a later process finds them there.
        out: Place that the export will have in the end.
        model: Source of the dense model.
        config: The recipe of the run.
        processes: Processes that share the work; a state is theirs only.
        device: Device of this process.
        progress: Display of progress.

    Returns:
        The record; None if the export is as it was pruned.

    Raises:
        SurgeonError: Errors of the disk, and of processes that are gone.
    """
    own, display = directory / f"{processes.count}-processes", shown_in_first(progress, processes)
    try:
        work = _opened_by_all(
            lambda: opened(str(export), model, RecoverConfig.of_run(config), processes, device, display), processes
        )
        with writing(own, 0):
            own.mkdir(parents=True, exist_ok=True)
        record = _trained(replace(work, name=str(out)), own, None)
    except (OutputError, ProcessError):
        raise
    except SurgeonError as error:
        if processes.first:
            words = "%s The export is as it was pruned; `llm-surgeon recover` trains it with other options."
            logger.warning(words, error.cause)
        return None
    processes.from_first(lambda: _replace(export, own / "export", record))
    # On another machine nobody else removes it.
    shutil.rmtree(directory, ignore_errors=True)
    return record


def _opened_by_all(read: Callable[[], Work], processes: Processes) -> Work:
    """Open a recovery in every process, and end it in every process if it cannot be opened in one.

    Memory and files may differ between machines, and a process that goes on alone would wait for the others.

    Raises:
        SurgeonError: The error of this process, or one that says that another process has one.
    """
    work, found = None, None
    try:
        work = read()
    except SurgeonError as error:
        found = error
    if processes.total(float(found is not None))[0]:
        remedy = "Train the export afterwards, or give all machines the same files and enough memory."
        raise found or ConfigError("The training cannot begin in another process.", remedy)
    assert work is not None
    check_same_everywhere(work)
    return work


def _check_idle(config: RecoverConfig) -> None:
    """Refuse options that say what to learn from a teacher if there is none.

    Raises:
        ConfigError: If there is such an option with another value than its default.
    """
    fields = RecoverConfig.model_fields
    idle = [name for name in OF_TEACHERS if getattr(config, name) != fields[name].default]
    if idle:
        raise ConfigError(
            f"{', '.join(idle)} {'has' if len(idle) == 1 else 'have'} no effect without a teacher.",
            "Give --teacher, or leave it out.",
        )


def _replace(export: Path, result: Path, record: RecoveryRecord) -> None:
    """Put the files of a result in place of those of an export; directories in it, of single shots, stay."""
    with writing(result, _WORDS):
        _describe(record, result)
        flush(result)
        for path in export.glob("*.safetensors*"):
            path.unlink()
        for path in result.iterdir():
            target = export / path.name
            if path.is_dir():
                shutil.rmtree(target, ignore_errors=True)
            os.replace(path, target)
        sync(export)


def _trained(work: Work, directory: Path, command: str | None) -> RecoveryRecord:
    """Train, and leave the files of the result in the directory."""
    reset_peak(work.device)
    teacher, measured = _teacher(work)
    with _student(work) as (student, result):
        trained = sum(one.numel() for one in student.parameters() if one.requires_grad)
        training = Training(
            student,
            teacher,
            work.tokens.input_ids,
            work.text,
            work.config,
            work.processes,
            States(directory, work.processes),
            work.progress,
        )
        training.run()
        now = training.standing
        _check_better(now, None)
        values = {name: value.cpu() for name, value in result() if work.processes.first}
    del training, student, teacher, result
    gc.collect()
    written = work.processes.from_first(lambda: _written_or_error(work, values, directory / "export"))
    if isinstance(written, SurgeonError):
        raise written
    check, parameters, stored = written
    _check_better(now, stored)
    each, best = work.config.batch_size * work.config.seq_len, now.curves.best
    return RecoveryRecord(
        model=work.name,
        teacher=work.teacher_name,
        config=work.config.model_dump(mode="json"),
        sources=tuple(RecoverySource(**asdict(use)) for use in work.tokens.sources),
        curves=now.curves,
        perplexity=stored,
        teacher_perplexity=measured,
        tokens=now.step * each,
        result_tokens=now.step * each if best is None else best.tokens,
        stopped_early=now.step < work.config.steps,
        trained=trained,
        parameters=parameters,
        seconds=now.seconds,
        peak_memory=peak_bytes(work.device),
        versions=versions(),
        processes=work.processes.count,
        max_logit_difference=check.difference,
        logit_scale=check.scale,
        command=command,
    )


def _teacher(work: Work) -> tuple[Teacher | None, Perplexity | None]:
    """The dense model, and its perplexity on the held-out text."""
    if work.teacher is None:
        return None, None
    logger.info("loading %s", work.teacher_name)
    model = load_model(str(work.teacher), work.config.dtype, work.device, work.config.trust_remote_code)
    check_model(model)
    teacher, measured = Teacher(model, work.objective), None
    share_out(teacher, f"model.{pruned_family_of(model.config.model_type).blocks}", work.processes)
    if work.text is not None:
        with work.progress.phase("teacher: perplexity", work.text.work) as phase, together(teacher):
            measured = perplexity(model, work.text, phase.advance)
    return teacher, measured


@contextlib.contextmanager
def _student(work: Work) -> Iterator[tuple[Student, Callable[[], Iterator[tuple[str, Tensor]]]]]:
    """The export, ready to be trained, and a function that yields its trained parameters by name, whole."""
    logger.info("loading %s", work.name)
    config, blocks = work.config, work.family.blocks
    model = load_model(str(work.source), "auto", work.device, config.trust_remote_code)
    check_model(model)

    def parameters() -> Iterator[tuple[str, Tensor]]:
        trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
        return ((name, whole(value.detach())) for name, value in trained)

    result = parameters
    with ExitStack() as stack:
        if config.adapters is None:
            as_trained(model, work.family)
        else:
            # Imported late, as peft is optional.
            from llm_surgeon.recovery.low_rank import absorbed, adapted

            layers = stack.enter_context(adapted(model, blocks, config.adapters, config.seed))

            def result() -> Iterator[tuple[str, Tensor]]:
                return absorbed(layers)

        if config.gradient_checkpointing:
            recompute_activations(cast(nn.ModuleList, model.get_submodule(blocks)))
        student = Student(model, work.objective)
        share_out(student, f"model.{blocks}", work.processes)
        yield student, result


def _check_better(now: Standing, stored: Perplexity | None) -> None:
    """Make sure that training has helped.

    Args:
        now: The training at its end.
        stored: Perplexity of the result as it is stored; None before it is written, or without an evaluation.

    Raises:
        RecoveryError: If it has not.
    """
    points = now.curves.points
    if not points:
        return
    lowest = min(points[1:], key=lambda point: point.perplexity.nll).perplexity
    found = lowest if stored is None else stored
    if found.nll >= points[0].perplexity.nll:
        after = "at best after it" if stored is None else "after it, in the type in which the weights are stored"
        raise RecoveryError(
            f"Training has not helped: held-out perplexity was {points[0].perplexity.perplexity:.4g} before, and "
            f"{found.perplexity:.4g} {after}.",
            "Nothing was written. Lower --learning-rate, train on more text (--tokens), or on text that is more like "
            "that of --evaluation.",
        )


def _written_or_error(
    work: Work, values: Mapping[str, Tensor], directory: Path
) -> tuple[ReloadCheck, int, Perplexity | None] | SurgeonError:
    """The result of ``_written``, or an error of the model, which all processes have to know of."""
    try:
        return _written(work, values, directory)
    except (NonFiniteError, ExportMismatchError) as error:
        return error


def _written(work: Work, values: Mapping[str, Tensor], directory: Path) -> tuple[ReloadCheck, int, Perplexity | None]:
    """Write the result and check its files; returns the check, the number of parameters, and the perplexity."""
    logger.info("writing the result and reloading it in a fresh process")
    with writing(directory, _WORDS):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
    model = load_model(str(work.source), "auto", work.device, work.config.trust_remote_code)
    take(model, values.items())
    check, measured = write_recovered(model, work.family, work.source, directory), None
    if work.text is not None:
        with work.progress.phase("result: perplexity", work.text.work) as phase:
            measured = perplexity(model, work.text, phase.advance)
    return check, count_parameters(model), measured


def _describe(record: RecoveryRecord, export: Path) -> None:
    """Write the record of a recovery, and report, page and card with it."""
    published = recovery_without_paths(record)
    (export / RECORD).write_text(f"{published.model_dump_json(indent=2)}\n", encoding="utf8")
    describe(published, export)
