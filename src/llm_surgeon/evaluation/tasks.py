"""Accuracy on tasks, measured with ``lm-eval``, which is optional."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.errors import ConfigError, SurgeonError
from llm_surgeon.models.modes import frozen, products
from llm_surgeon.records import TaskFailure, TaskMetric, TaskScore, TaskScores
from llm_surgeon.report.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from llm_surgeon.evaluation.harness import Harness

logger = logging.getLogger(__name__)

# Metrics that are a share of right answers, the preferred one first. Others (a perplexity, a BLEU) are on scales of
# their own, and no mean over tasks can be taken of them.
ACCURACIES = ("acc", "acc_norm", "exact_match")


@dataclass(frozen=True)
class TaskSelection:
    """Tasks that exist.

    Attributes:
        names: Their names, each once.
        index: lm-eval's index of the task files in which they were found.
    """

    names: tuple[str, ...]
    index: Any


def require_lm_eval() -> None:
    """Find out early whether tasks can be measured.

    Raises:
        ConfigError: If the optional package ``lm-eval`` is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "Tasks are measured with the package lm-eval, which is not installed.",
            'Install it with `pip install "llm-surgeon[tasks]"`, or measure perplexity only, without tasks.',
        )


def find_tasks(tasks: Iterable[str], include_path: Path | None = None) -> TaskSelection:
    """Look tasks up, before anything is loaded.

    Args:
        tasks: Names of single tasks; one named twice is taken once, since it would count twice in the mean.
        include_path: Directory with task files (YAML) of one's own; a task there hides one of lm-eval of that name.

    Returns:
        The tasks that were found, to give to ``evaluate_tasks``.

    Raises:
        ConfigError: If lm-eval is not installed, there is no such directory, no task is named, or a name is not known
            or is that of a group of tasks.
    """
    require_lm_eval()
    names = tuple(dict.fromkeys(name.strip() for name in tasks if name.strip()))
    if not names:
        raise ConfigError("No task is named.", "Name tasks, for example --tasks boolq,piqa,hellaswag.")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"The directory of tasks {include_path} does not exist.", "Check --tasks-path.")
    from llm_surgeon.evaluation.harness import index_tasks

    index = index_tasks(names, include_path)
    for name in names:
        _check_single(name, index)
    return TaskSelection(names, index)


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | TaskSelection,
    *,
    limit: int | None = None,
    shots: int = 0,
    batch_size: int = 1,
    include_path: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    precision: str = "bfloat16",
) -> TaskScores:
    """Accuracy of a model in memory on tasks of lm-eval, and the plain mean of the accuracies.

    What enters the mean is ``acc``, the share of samples for which the right answer is the most likely one, also
    where a task reports ``acc_norm``, for which the log-likelihoods are divided by the answers' lengths in
    characters; ``acc_norm`` or ``exact_match`` enter it for tasks that have no ``acc``. All metrics are in the result.
    No chat template is applied. Task files may bring Python code, which is run.

    A task that cannot be measured, because its data set cannot be had, for example, does not stop the others.

    Args:
        model: Dense or pruned.
        tokenizer: Its tokenizer.
        tasks: Names of single tasks, or what ``find_tasks`` found.
        limit: The first so many samples of each task; all if None. An estimate, not the task's result.
        shots: Solved examples before each question; tasks that fix theirs at none keep that.
        batch_size: Requests per pass.
        include_path: Directory with task files of one's own, see ``find_tasks``.
        progress: Where progress is shown; nowhere if None.
        seed: Seed of the solved examples and of all else that a task draws.
        precision: ``bfloat16`` or ``float32``.

    Returns:
        The scores in the order asked for, the failures, and the mean.

    Raises:
        ConfigError: If an option makes no sense, or ``find_tasks`` refuses the tasks.
        NonFiniteError: If a log-likelihood of the model is not a number.
    """
    if precision not in ("bfloat16", "float32"):
        raise ConfigError(f"The precision {precision!r} is not known.", "Use bfloat16 or float32.")
    if shots < 0 or batch_size < 1 or (limit is not None and limit < 1):
        raise ConfigError(
            f"Tasks cannot be measured with limit={limit}, shots={shots}, batch_size={batch_size}.",
            "Limit and batch size are at least 1, the shots at least 0.",
        )
    selection = tasks if isinstance(tasks, TaskSelection) else find_tasks(tasks, include_path)
    from llm_surgeon.evaluation.harness import Harness

    scores: list[TaskScore] = []
    failures: list[TaskFailure] = []
    with frozen(model), products(precision):
        harness = Harness(model, tokenizer, batch_size, precision, progress or SilentProgress())
        for name in selection.names:
            result = _measure(harness, selection, name, limit=limit, shots=shots, seed=seed)
            if isinstance(result, TaskFailure):
                logger.warning("%s", result.cause)
                failures.append(result)
            else:
                scores.append(result)
    accuracies = [score.metrics[score.accuracy].value for score in scores if score.accuracy is not None]
    return TaskScores(
        scores=tuple(scores),
        failures=tuple(failures),
        mean=fmean(accuracies) if accuracies else None,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        precision=precision,
        lm_eval=version("lm-eval"),
    )


def _check_single(name: str, index: Any) -> None:
    """Raise a ConfigError unless ``name`` is a task, and not a group of tasks."""
    if name in index.all_subtasks:
        return
    if name in index.all_tasks:
        raise ConfigError(
            f"{name!r} is a group of tasks, and the mean is taken over single tasks.", _advice(name, index.all_subtasks)
        )
    raise ConfigError(f"The task {name!r} is not known.", _advice(name, index.all_subtasks))


def _advice(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=5) or [other for other in known if other.startswith(name)][:5]
    place = "Tasks of your own are found with --tasks-path."
    return f"Similar names: {', '.join(close)}. {place}" if close else f"No task has a similar name. {place}"


def _measure(
    harness: Harness, selection: TaskSelection, name: str, *, limit: int | None, shots: int, seed: int
) -> TaskScore | TaskFailure:
    """Measure one task; whatever is wrong with the task, and not with the model, is a failure of this task alone."""
    # Tasks are YAML files with templates and Python code, on data from anywhere: errors may be of any kind.
    try:
        task = harness.load(selection.index, name, shots=shots, seed=seed)
    except Exception as error:
        logger.debug("the task %s cannot be loaded", name, exc_info=True)
        return _not_loaded(name, harness.data_of(selection.index, name), error, harness.is_data_error(error))
    try:
        result = harness.run(task, name, limit=limit, seed=seed)
    except SurgeonError:
        raise
    except Exception as error:
        logger.debug("the task %s failed", name, exc_info=True)
        return TaskFailure(
            task=name,
            cause=f"The task {name} failed: {_one_line(error)}.",
            remedy="Check that its file and its data fit together, and that the model can do what it asks for.",
        )
    metrics = {key: TaskMetric(value=value, stderr=stderr) for key, (value, stderr) in result.metrics.items()}
    return TaskScore(
        task=name,
        version=result.version,
        metrics=metrics,
        accuracy=accuracy_of(metrics),
        shots=result.shots,
        samples=result.samples,
        samples_total=result.samples_total,
    )


def accuracy_of(metrics: Mapping[str, TaskMetric]) -> str | None:
    """Which metric of a task enters the mean; None if none is an accuracy."""
    for accuracy in ACCURACIES:
        for key in metrics:
            if key.partition(",")[0] == accuracy:
                return key
    return None


def _not_loaded(name: str, data: str, error: Exception, no_data: bool) -> TaskFailure:
    if no_data:
        return TaskFailure(
            task=name,
            cause=f"The data set {data} of the task {name} cannot be had: {_one_line(error)}.",
            remedy="Connect to the network (and log in to the hub if the data set asks for it), or give a task file "
            "with local data in --tasks-path.",
        )
    return TaskFailure(
        task=name,
        cause=f"The task {name} on the data set {data} cannot be set up: {_one_line(error)}.",
        remedy="Check the task's file, and that the data set has what it asks for.",
    )


def _one_line(error: Exception) -> str:
    """Kind and message of an error on one line, shortened."""
    message = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
