"""Accuracy on tasks, measured with ``lm-eval``.

``lm-eval`` is optional, and is imported only when tasks are wanted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.errors import ConfigError, NonFiniteError, SurgeonError
from llm_surgeon.models.modes import frozen, products
from llm_surgeon.records import TaskFailure, TaskScore, TaskScores
from llm_surgeon.system.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from llm_surgeon.evaluation.task_files import SingleTask


def require_lm_eval() -> None:
    """Make sure, before anything expensive, that tasks can be measured.

    Raises:
        ConfigError: If the optional package ``lm-eval`` is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "Tasks are measured with the package lm-eval, which is not installed.",
            'Install it with `pip install "llm-surgeon[tasks]"`, or measure perplexity only, without tasks.',
        )


def find_tasks(tasks: Iterable[str], include_path: Path | None = None) -> dict[str, SingleTask]:
    """Look tasks up by name, before anything is loaded.

    Args:
        tasks: Names of tasks, or of groups (or tags) of tasks, which stand for their tasks in their order. A task that
            is named twice is taken once, since it would count twice in the mean.
        include_path: Directory with task files (YAML) of the user's own; a task there hides lm-eval's of that name.

    Returns:
        The single tasks that were found, by name, to give to ``evaluate_tasks``.

    Raises:
        ConfigError: If lm-eval is not installed, there is no such directory, no task is named, a name is not known, or
            a group is malformed.
    """
    require_lm_eval()
    names = tuple(dict.fromkeys(name.strip() for name in tasks if name.strip()))
    if not names:
        raise ConfigError("No task is named.", "Name tasks, for example --tasks boolq,piqa,hellaswag.")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"There is no directory of tasks {include_path}.", "Check --tasks-path.")
    from llm_surgeon.evaluation.task_files import find

    return find(names, include_path)


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure, before anything expensive, that a tokenizer has a chat template to put questions into.

    Raises:
        ConfigError: If the tokenizer has none.
    """
    try:
        tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(
            "The model's tokenizer has no chat template (or several, and none by default).",
            "Leave --apply-chat-template out, as for every model that is not made for conversations.",
        ) from None


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] | Mapping[str, SingleTask],
    *,
    limit: int | None = None,
    shots: int = 0,
    batch_size: int = 1,
    include_path: Path | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    apply_chat_template: bool = False,
    precision: str = "bfloat16",
) -> TaskScores:
    """Accuracy of a model in memory on tasks of lm-eval, and the plain mean of the accuracies.

    The mean is taken of ``acc``, the share of samples for which the right answer is the most likely one. For tasks that
    have no ``acc`` it takes ``acc_norm``, for which log-likelihoods are divided by the answers' lengths in characters,
    or else ``exact_match``. All metrics are in the result. Task files may bring Python code, which is run.

    A task that cannot be measured, for example because its data set cannot be had, does not stop the others. Other
    packages' lines and progress bars are off while tasks run. If the hub cannot be reached, it is not asked again.

    Args:
        model: The model, dense or pruned.
        tokenizer: Tokenizer of the model.
        tasks: Names of tasks or groups of tasks, or the result of ``find_tasks``.
        limit: Number of samples of each task, from the first; all if None. A limit gives an estimate only.
        shots: Solved examples before each question; tasks that fix theirs at none keep that.
        batch_size: Requests per pass.
        include_path: Directory with task files of the user's own, see ``find_tasks``.
        progress: Display of the progress; none if None.
        seed: Seed of the solved examples and of all else that a task draws.
        apply_chat_template: Whether questions, and solved examples as turns of the conversation before them, are put
            into the tokenizer's chat template.
        precision: ``bfloat16`` or ``float32``.

    Returns:
        The scores in the order asked for, the failures, and the mean.

    Raises:
        ConfigError: If an option is out of range, the tokenizer has no chat template, or ``find_tasks`` refuses the
            tasks.
        NonFiniteError: If a log-likelihood of the model is not a number.
    """
    _check_options(limit, shots, batch_size, seed, precision)
    if apply_chat_template:
        check_chat_template(tokenizer)
    chosen = tasks if isinstance(tasks, Mapping) else find_tasks(tasks, include_path)
    from llm_surgeon.evaluation.harness import MeasuredModel, measure
    from llm_surgeon.evaluation.other_packages import quiet_packages

    scores: list[TaskScore] = []
    failures: list[TaskFailure] = []
    with frozen(model), products(precision), quiet_packages():
        measured = MeasuredModel(model, tokenizer, batch_size, precision, progress or SilentProgress())
        for task in chosen.values():
            try:
                scores.append(
                    measure(measured, task, limit=limit, shots=shots, seed=seed, chat_template=apply_chat_template)
                )
            except NonFiniteError:
                raise
            # An error of a task, unlike one of the model, is a failure of this task alone.
            except SurgeonError as error:
                failures.append(TaskFailure(task=task.name, cause=error.cause, remedy=error.remedy))
    accuracies = [score.metrics[score.accuracy].value for score in scores if score.accuracy is not None]
    return TaskScores(
        scores=tuple(scores),
        failures=tuple(failures),
        mean=fmean(accuracies) if accuracies else None,
        limit=limit,
        batch_size=batch_size,
        seed=seed,
        chat_template=apply_chat_template,
        precision=precision,
        lm_eval=version("lm-eval"),
    )


def _check_options(limit: int | None, shots: int, batch_size: int, seed: int, precision: str) -> None:
    if precision not in ("bfloat16", "float32"):
        raise ConfigError(f"The precision {precision!r} is not known.", "Use bfloat16 or float32.")
    if shots < 0 or batch_size < 1 or (limit is not None and limit < 1) or not 0 <= seed < 2**32:
        raise ConfigError(
            f"Tasks cannot be measured with limit={limit}, shots={shots}, batch_size={batch_size}, seed={seed}.",
            "Limit and batch size are at least 1, the shots and the seed at least 0, and the seed below 2**32.",
        )
