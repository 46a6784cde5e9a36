"""Recovery of an export: training after pruning, on the dense model's predictions or on text alone."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm_surgeon.data.corpora import HUB_CHARACTERS, load_corpus
from llm_surgeon.data.sequences import TrainingTokens, training_tokens
from llm_surgeon.data.texts import text_to_evaluate
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.errors import OutputError, RecoveryError
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.models import Family, pruned_family_of
from llm_surgeon.models.loading import (
    check_checkpoint,
    load_config,
    load_model,
    load_tokenizer,
    local_directory,
    model_type_of,
    resolve_device,
    resolve_source,
    source_files,
)
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.recovery import RecoverConfig
from llm_surgeon.recipe.sources import sources_of
from llm_surgeon.records import Perplexity, RecoveryIdentity, RecoveryRecord, RecoverySource
from llm_surgeon.recovery.low_rank import absorbed, adapted
from llm_surgeon.recovery.objective import Objective, Student, Teacher
from llm_surgeon.recovery.preparing import (
    as_trained,
    check_memory,
    check_same_tokens,
    check_same_vocabulary,
    check_shares,
    recompute_activations,
)
from llm_surgeon.recovery.sharding import share_out, together, whole
from llm_surgeon.recovery.states import STATE, States
from llm_surgeon.recovery.training import Standing, Training
from llm_surgeon.recovery.writing import take, write_recovered
from llm_surgeon.report.publish import recovery_without_paths
from llm_surgeon.run.job import count_parameters
from llm_surgeon.run.opening import shown_in_first
from llm_surgeon.run.recovery_report import describe
from llm_surgeon.run.run_directory import locked, path_of
from llm_surgeon.session.given import as_path, as_progress, check_model
from llm_surgeon.session.preconditions import check_positions, check_tokens
from llm_surgeon.system.files import check_disk_space, check_output, flush, in_place, sync, writing
from llm_surgeon.system.memory import peak_bytes, reset_peak
from llm_surgeon.system.processes import Processes, joined, own_device
from llm_surgeon.system.progress import Progress
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)

RECORD = "recovery.json"
IDENTITY = "recover.json"
# Characters of a token, at most, on the average of a text.
_CHARACTERS = 8


@dataclass(frozen=True)
class _Work:
    """All that a recovery has read before it loads a model.

    Attributes:
        name: Name of the export, as it was given.
        source: Directory of the export.
        teacher: Source of the dense model; None for training on text alone.
        config: The recipe.
        tokenizer: Tokenizer of the export.
        tokens: Sequences to train on.
        text: Held-out text; None evaluates nothing.
        processes: Processes that share the work.
        device: Device of this process.
        progress: Display of the progress.
    """

    name: str
    source: Path
    teacher: str | None
    config: RecoverConfig
    tokenizer: PreTrainedTokenizerBase
    tokens: TrainingTokens
    text: EvaluationText | None
    processes: Processes
    device: torch.device
    progress: Progress

    @property
    def family(self) -> Family:
        """Entry of the export's architecture."""
        return pruned_family_of(model_type_of(str(self.source)))

    @property
    def objective(self) -> Objective:
        """What the export learns."""
        config = self.config
        return Objective(config.temperature, config.top_k, config.label_weight)

    def identity(self) -> RecoveryIdentity:
        """Identity of the recovery."""
        digest = hashlib.sha256(self.tokens.input_ids.numpy().tobytes())
        if self.text is not None:
            digest.update(self.text.tokens.numpy().tobytes())
        models = [str(self.source)] + ([self.teacher] if self.teacher else [])
        return RecoveryIdentity(
            files={one: source_files(one, load_config(one, self.config.trust_remote_code)) for one in models},
            config=self.config.model_dump(mode="json"),
            texts=digest.hexdigest(),
            processes=self.processes.count,
        )


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

    States of the training are kept in ``OUT.run`` beside ``out``. However the process ends, the same call goes on, and
    on one process to the last bit. The result has the weights after which held-out perplexity was lowest.

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
        NonFiniteError: If a loss is not finite.
        OutputError: If ``out`` cannot be used, or a recovery was begun there with something else.
        DiskSpaceError: If the disk is too full.
        ConfigError: If the recipe is not valid, or the teacher has other tokens.
        ModelError: If a model cannot be loaded.
        DataError: If a text cannot be read.
    """
    given = config.model_dump(exclude_unset=True) if isinstance(config, RecoverConfig) else dict(config or {})
    recipe, out = RecoverConfig.from_mapping(given | options), Path(os.path.abspath(as_path(out)))
    device = resolve_device(own_device(recipe.device))
    with joined(device) as processes, _directory(out, processes) as directory:
        work = _opened(str(model), teacher, recipe, processes, device, as_progress(progress))
        done = processes.from_first(lambda: _begin(work, out, directory))
        if done is not None:
            return done
        reset_peak(device)
        record = _train(work, directory, command)
        return processes.from_first(lambda: _finish(work, record, out, directory))


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
    """Train the export of a run, before it is moved to its place, on the run's texts; the result replaces it.

    If the training does not help, the export stays as it was pruned, and this is logged.

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
        The record; None if the training has not helped.

    Raises:
        SurgeonError: Other errors of ``recover``.
    """
    directory = directory / f"{processes.count}-processes"
    directory.mkdir(parents=True, exist_ok=True)
    work = replace(
        _opened(str(export), model, RecoverConfig.of_run(config), processes, device, progress), name=str(out)
    )
    try:
        record = _train(work, directory, None)
    except RecoveryError as error:
        if processes.first:
            logger.warning("%s The export is as it was pruned; a lower --recover-learning-rate may help.", error.cause)
        return None

    def replaced() -> None:
        result = directory / "export"
        with writing(result, 2**20):
            _describe(record, result)
            # Exports of single shots lie in that of the run.
            for path in export.iterdir():
                if path.is_dir() and not (result / path.name).exists():
                    path.rename(result / path.name)
            shutil.rmtree(export)
            result.rename(export)

    processes.from_first(replaced)
    return record


@contextlib.contextmanager
def _directory(out: Path, processes: Processes) -> Iterator[Path]:
    """Directory of the recovery, locked by the first process.

    It is removed at the end, after an error too if no state in it is worth keeping.
    """
    path = path_of(out)
    with ExitStack() as stack:
        if processes.first:
            stack.enter_context(locked(out, IDENTITY))
        # On another machine there is no directory yet.
        processes.total(0.0)
        path.mkdir(parents=True, exist_ok=True)
        try:
            yield path
        except BaseException:
            if any(path.glob(f"{STATE}-*.safetensors")):
                if processes.first:
                    logger.warning("the same command goes on from its last state (%s has what it needs)", path)
            else:
                shutil.rmtree(path, ignore_errors=True)
            raise
        processes.total(0.0)
        shutil.rmtree(path, ignore_errors=True)


def _opened(
    model: str,
    teacher: str | Path | None,
    config: RecoverConfig,
    processes: Processes,
    device: torch.device,
    progress: Progress | None,
) -> _Work:
    """Read what a recovery needs but for the weights, and check it.

    Raises:
        SurgeonError: If something does not go together; see ``recover``.
    """
    check_shares(config, processes)
    trusted = config.trust_remote_code
    source = local_directory(model)
    pruned_family_of(model_type_of(str(source)))
    check_checkpoint(str(source), trusted)
    settings, tokenizer = load_config(str(source), trusted), load_tokenizer(str(source), trusted)
    lengths = {"seq_len": config.seq_len} | ({"eval_window": config.eval_window} if config.evaluates else {})
    check_positions(settings, lengths)
    dense = None if teacher is None else resolve_source(str(teacher))
    if dense is not None:
        check_checkpoint(dense, trusted)
        check_same_vocabulary(settings, load_config(dense, trusted), str(teacher))
        check_same_tokens(tokenizer, load_tokenizer(dense, trusted), str(teacher))
    evaluated = sources_of(config.evaluation or config.data) if config.evaluates else ()
    split = frozenset(source.text for source in config.sources) & frozenset(source.text for source in evaluated)
    # Of a hub data set as much is streamed as is trained on, if there is so much.
    characters = max(HUB_CHARACTERS, _CHARACTERS * config.tokens)
    read = {source.text: load_corpus(source.text, characters) for source in config.sources}
    tokens = training_tokens(
        tokenizer,
        config.sources,
        split,
        sequences=config.steps * config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        bos=config.bos,
        given=read,
    )
    text = None
    if config.evaluates:
        text = text_to_evaluate(
            tokenizer,
            evaluated,
            split,
            window=config.eval_window,
            max_tokens=config.eval_tokens,
            precision=config.precision,
            bos=config.bos,
            given=read,
        )
    check_tokens(settings, [tokens.input_ids, *([text.tokens] if text is not None else [])])
    return _Work(
        model, source, dense, config, tokenizer, tokens, text, processes, device, shown_in_first(progress, processes)
    )


def _begin(work: _Work, out: Path, directory: Path) -> RecoveryRecord | None:
    """Compare a recovery with the one that was begun here, or begin it; returns the record of a complete one.

    Raises:
        OutputError: If another was begun here, or there is something at ``out``.
        DiskSpaceError: If the disk is too full.
    """
    now, path = work.identity(), directory / IDENTITY
    former = _read_identity(path)
    if former is not None and former != now:
        changed = [name for name in RecoveryIdentity.model_fields if getattr(former, name) != getattr(now, name)]
        raise OutputError(
            f"The recovery in {directory} was begun with something else ({', '.join(changed)}).",
            f"Restore that to continue it, or remove {directory}, or give another --out.",
        )
    if former is not None and (out / RECORD).is_file():
        # The process ended between the move of the result and the removal of the directory.
        return RecoveryRecord.model_validate_json((out / RECORD).read_bytes())
    check_output(out)
    if former is None:
        size = sum(file.stat().st_size for file in work.source.glob("*.safetensors"))
        check_disk_space(directory, size if work.config.adapters else _disk_bytes(work.source, size))
        with in_place(path) as beside:
            beside.write_text(now.model_dump_json(indent=2) + "\n", encoding="utf8")
    return None


def _disk_bytes(source: Path, weights: int) -> int:
    """Bytes of two states and two best weights of all parameters in float32, and of the result."""
    dtype = getattr(load_config(str(source)), "dtype", None)
    parameters = weights // (dtype.itemsize if isinstance(dtype, torch.dtype) else 4)
    return (2 * 3 + 2) * 4 * parameters + weights


def _read_identity(path: Path) -> RecoveryIdentity | None:
    try:
        return RecoveryIdentity.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _train(work: _Work, directory: Path, command: str | None) -> RecoveryRecord:
    """Train, and leave the files of the result in the directory."""
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
        _check_better(training.standing, directory)
        values = {name: value.cpu() for name, value in result() if work.processes.first}
        now = training.standing
    del training, student, teacher, result
    gc.collect()
    check, parameters = work.processes.from_first(lambda: _written(work, values, directory / "export"))
    each, best = work.config.batch_size * work.config.seq_len, now.curves.best
    return RecoveryRecord(
        model=work.name,
        teacher=work.teacher,
        config=work.config.model_dump(mode="json"),
        sources=tuple(RecoverySource(**asdict(use)) for use in work.tokens.sources),
        curves=now.curves,
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


def _teacher(work: _Work) -> tuple[Teacher | None, Perplexity | None]:
    """The dense model, and its perplexity on the held-out text."""
    if work.teacher is None:
        return None, None
    logger.info("loading %s", work.teacher)
    config = work.config
    model = load_model(work.teacher, config.dtype, work.device, config.trust_remote_code)
    check_model(model)
    teacher, measured = Teacher(model, work.objective), None
    share_out(teacher, f"model.{pruned_family_of(model.config.model_type).blocks}", work.processes)
    if work.text is not None:
        with work.progress.phase("teacher: perplexity", work.text.work) as phase, together(teacher):
            measured = perplexity(model, work.text, phase.advance)
    return teacher, measured


@contextlib.contextmanager
def _student(work: _Work) -> Iterator[tuple[Student, Callable[[], Iterator[tuple[str, Tensor]]]]]:
    """The export, ready to be trained, and a function that yields its trained parameters by name, whole."""
    logger.info("loading %s", work.name)
    config, processes = work.config, work.processes
    model = load_model(str(work.source), "auto", work.device, config.trust_remote_code)
    check_model(model)
    layers: dict[str, Any] | None = None
    with ExitStack() as stack:
        if config.adapters is None:
            as_trained(model, work.family)
        else:
            layers = stack.enter_context(adapted(model, work.family.blocks, config.adapters, config.seed))
        check_memory(model, work.device, processes)
        if config.gradient_checkpointing:
            recompute_activations(cast(nn.ModuleList, model.get_submodule(work.family.blocks)))
        student = Student(model, work.objective)
        share_out(student, f"model.{work.family.blocks}", processes)

        def result() -> Iterator[tuple[str, Tensor]]:
            if layers is not None:
                return absorbed(layers)
            trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
            return ((name, whole(value.detach())) for name, value in trained)

        yield student, result


def _check_better(now: Standing, directory: Path) -> None:
    """Make sure that training has helped.

    Raises:
        RecoveryError: If it has not.
    """
    points = now.curves.points
    if now.best == 0:
        lowest = min(point.perplexity.perplexity for point in points[1:])
        raise RecoveryError(
            f"Training has not helped: held-out perplexity was {points[0].perplexity.perplexity:.4g} before, and "
            f"{lowest:.4g} at best after it.",
            "Nothing was written. Lower --learning-rate, or train on text that is more like what --evaluation names; "
            f"remove {directory} or give another --out.",
        )


def _written(work: _Work, values: Mapping[str, Tensor], directory: Path) -> tuple[ReloadCheck, int]:
    """Write the result and check its files; returns the check, and the number of parameters."""
    logger.info("writing the result and reloading it in a fresh process")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    model = load_model(str(work.source), "auto", "cpu", work.config.trust_remote_code)
    take(model, values.items())
    return write_recovered(model, work.family, work.source, directory), count_parameters(model)


def _describe(record: RecoveryRecord, export: Path) -> None:
    """Write the record of a recovery, and report, page and card with it."""
    text = recovery_without_paths(record).model_dump_json(indent=2)
    (export / RECORD).write_text(f"{text}\n", encoding="utf8")
    describe(record, export)


def _finish(work: _Work, record: RecoveryRecord, out: Path, directory: Path) -> RecoveryRecord:
    """Write the record, and report and card with it, and move the result to its place."""
    export = directory / "export"
    with writing(export, 2**20):
        _describe(record, export)
        flush(export)
    check_output(out)
    os.replace(export, out)
    sync(out.parent)
    return record
