"""One task of ``lm-eval`` at a time, on a model in memory.

The one file that imports ``lm_eval``, which is optional: import this file only where tasks are wanted.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
from datasets.exceptions import DatasetsError
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.errors import ModelError, NonFiniteError
from llm_surgeon.report.progress import Phase, Progress

logger = logging.getLogger(__name__)

# The two strings of a request, the tokens of the context, and those of the continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass(frozen=True)
class TaskResult:
    """What a task gave, in lm-eval's terms.

    Attributes:
        metrics: Value and standard error by name; ``,filter`` follows the name where answers are filtered.
        version: The task's version.
        shots: Solved examples before each question.
        samples: Samples measured.
        samples_total: Samples that the task has.
    """

    metrics: dict[str, tuple[float, float | None]]
    version: str
    shots: int
    samples: int
    samples_total: int


def index_tasks(names: Sequence[str], include_path: Path | None) -> Any:
    """lm-eval's index of task files: those in ``include_path`` if all names are there, else its own as well."""
    with _quiet():
        if include_path is not None:
            # lm-eval has thousands of files, and reading them takes seconds.
            own = TaskManager(include_path=str(include_path), include_defaults=False)
            if set(names) <= set(own.all_subtasks):
                return own
        return TaskManager(include_path=None if include_path is None else str(include_path))


class Harness:
    """Runs tasks on one model, which it leaves as it is except for its mode; see ``frozen``.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; a copy is used, because lm-eval gives it a padding token.
        batch_size: Requests per pass.
        precision: ``bfloat16`` (autocast) or ``float32``.
        progress: Where progress is shown.

    Raises:
        ModelError: If there is no token to put before an answer that has no question.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        precision: str,
        progress: Progress,
    ) -> None:
        with _quiet():
            self._model = _MeasuredModel(model, copy.deepcopy(tokenizer), batch_size, precision, progress)

    def load(self, index: Any, name: str, *, shots: int, seed: int) -> Any:
        """Set a task up, with its data.

        Args:
            index: What ``index_tasks`` gave.
            name: The task's name.
            shots: Solved examples before each question; a task that fixes them at none keeps that.
            seed: Seed of what the task draws.

        Raises:
            Exception: Whatever lm-eval, the task's own code or the loading of its data raise.
        """
        with _quiet(), _seeded(seed):
            (task,) = index.load([name])["tasks"].values()
            if task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=shots)
            task.set_fewshot_seed(seed=seed)
        return task

    def run(self, task: Any, name: str, *, limit: int | None, seed: int) -> TaskResult:
        """Measure a task.

        Args:
            task: What ``load`` gave.
            name: The task's name.
            limit: The first so many samples; all if None.
            seed: Seed of what the task draws.

        Raises:
            NonFiniteError: If a log-likelihood is not a number.
            Exception: Whatever lm-eval and the task's own code raise.
        """
        self._model.task = name
        with _quiet(), _without_bar(), _seeded(seed):
            # Not simple_evaluate, which collects the machine's particulars for seconds. Its bootstrap is of no use for
            # accuracies, and starts processes.
            results = evaluate(
                lm=self._model,
                # Not the task's own name: asking for it draws a random number.
                task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        return _read(results, name)

    @staticmethod
    def data_of(index: Any, name: str) -> str:
        """The data set that a task's file names, in words."""
        settings = index.task_index[name].cfg or {}
        files = (settings.get("dataset_kwargs") or {}).get("data_files")
        parts = (settings.get("dataset_path"), settings.get("dataset_name"), files)
        return ", ".join(str(part) for part in parts if part) or "without a name"

    @staticmethod
    def is_data_error(error: Exception) -> bool:
        """Whether data is missing; connections and the hub's refusals are operating system errors to Python."""
        return isinstance(error, OSError | DatasetsError)


class _MeasuredModel(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """lm-eval's model, with our progress instead of its bars, and refusing results that are not numbers."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        precision: str,
        progress: Progress,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            backend="causal",
            mixed_precision_dtype="bfloat16" if precision == "bfloat16" else None,
            softmax_dtype="float32",
            prefix_token_id=_first_token(model, tokenizer),
        )
        self.task = ""
        self._progress = progress
        self._windows: Phase

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        tokens = sum(len(self.tok_encode(request.args[0])) for request in requests)
        with self._progress.phase(self.task, tokens) as phase:
            self._windows = phase
            sums: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether it is the model's own choice."""
        # The windows of long texts come one batch a call, without their text.
        windows = all(text is None for text, _, _ in requests)
        answers = self._windows_of_text(requests, override_bs) if windows else self._whole_requests(requests)
        if any(math.isnan(value) for value, _ in answers):
            raise NonFiniteError(
                f"A log-likelihood that the task {self.task} asks for is not a number.",
                "Evaluate with --precision float32, or check the model's weights.",
            )
        return answers

    def _windows_of_text(self, requests: Sequence[Request], batch_size: int | None) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(
            requests, disable_tqdm=True, override_bs=batch_size
        )
        self._windows.advance(sum(len(continuation) for _, _, continuation in requests))
        return answers

    def _whole_requests(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        self._say_what_is_cut(requests)
        sizes = {text: len(context) + len(continuation) for text, context, continuation in requests if text}
        with self._progress.phase(self.task, sum(len(request[1]) + len(request[2]) for request in requests)) as phase:
            self.set_cache_hook(_Answers(sizes, phase.advance))
            answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        self.set_cache_hook(CacheHook(None))
        return answers

    def _say_what_is_cut(self, requests: Sequence[Request]) -> None:
        # The last token is scored and not read.
        long = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if long:
            logger.warning(
                "%s: %d of %d requests are longer than the model's %d tokens; their beginning is left out",
                *(self.task, long, len(requests), self.max_length),
            )


class _Answers(CacheHook):  # type: ignore[misc]  # lm-eval is not typed
    """Told of every answer as it comes; reports the tokens of its request."""

    def __init__(self, sizes: dict[tuple[str, str], int], advance: Callable[[int], None]) -> None:
        super().__init__(None)
        self._sizes = sizes
        self._advance = advance

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._advance(self._sizes.get(req, 0))


def _first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token before an answer that has no question: the text's first, or else the one that ends texts."""
    for holder in (tokenizer, model.config):
        for name in ("bos_token_id", "eos_token_id"):
            token = getattr(holder, name, None)
            if isinstance(token, int):
                return token
    raise ModelError(
        "Neither the tokenizer nor the model's configuration has a token that begins or ends a text.",
        "Set bos_token in the tokenizer's configuration.",
    )


def _read(results: Any, name: str) -> TaskResult:
    """lm-eval's result as our own."""
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in results["results"][name].items():
        metric, _, chosen = key.partition(",")
        if chosen and not metric.endswith("_stderr") and isinstance(value, int | float | np.number):
            samples = [one[metric] for one in results["samples"][name] if one["filter"] == chosen and metric in one]
            metrics[metric if chosen == "none" else key] = (float(value), _standard_error(float(value), samples))
    counts = results["n-samples"][name]
    return TaskResult(
        metrics=metrics,
        version=str(results["versions"].get(name)),
        shots=int(results["n-shot"].get(name, 0)),
        samples=int(counts["effective"]),
        samples_total=int(counts["original"]),
    )


def _standard_error(value: float, samples: Sequence[Any]) -> float | None:
    """Standard error of a metric that is the mean of what each sample gave; None if it is something else."""
    if len(samples) < 2 or not all(isinstance(sample, int | float | np.number) for sample in samples):
        return None
    numbers = [float(sample) for sample in samples]
    return stdev(numbers) / math.sqrt(len(numbers)) if math.isclose(fmean(numbers), value, abs_tol=1e-9) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out lm-eval's notices; they are on defaults and on a model given as an object, not as a name."""
    logs = logging.getLogger("lm_eval")
    before = logs.level
    logs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logs.setLevel(before)


@contextmanager
def _without_bar() -> Iterator[None]:
    """Leave out a bar of lm-eval that no option turns off and that would be drawn into ours."""
    module: Any = lm_eval.api.task
    before = module.tqdm
    module.tqdm = lambda items, **_: items
    try:
        yield
    finally:
        module.tqdm = before


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every global generator that the code of a task may use, and put back the state they were in."""
    plain, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(arrays)
