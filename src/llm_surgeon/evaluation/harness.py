"""Measurement of one task of ``lm-eval`` on a model in memory.

``lm_eval`` is optional: import this file, and the files on tasks that it imports, only where tasks are wanted.
"""

from __future__ import annotations

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import CacheHook
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.errors import ConfigError, ModelError, NonFiniteError, SurgeonError
from llm_surgeon.evaluation.other_packages import one_line
from llm_surgeon.evaluation.task_files import SingleTask
from llm_surgeon.evaluation.task_loading import load_task
from llm_surgeon.evaluation.task_metrics import accuracy_of, read_metrics
from llm_surgeon.records import TaskScore
from llm_surgeon.system.progress import Phase, Progress

logger = logging.getLogger(__name__)

# The two strings of a request, the tokens of the context, and those of the continuation.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


def measure(
    model: MeasuredModel, chosen: SingleTask, *, limit: int | None, shots: int, seed: int, chat_template: bool
) -> TaskScore:
    """Load and measure a task, inside ``quiet_packages``.

    Args:
        model: The model.
        chosen: The task.
        limit: Number of samples to measure, from the first; all if None.
        shots: Solved examples before each question; a task that fixes them at none keeps that.
        seed: Seed of all that the task draws.
        chat_template: Whether questions and examples are put into the tokenizer's chat template.

    Raises:
        NonFiniteError: If a log-likelihood is not a number, which is an error of the model.
        SurgeonError: If the task cannot be loaded, fails, or does not give the metrics that its file asks for.
    """
    with _seeded(seed):
        task, examples, examples_measured = load_task(chosen, shots, seed)
    with _seeded(seed):
        results = _run(model, chosen.name, task, limit, chat_template)
    counts = results["n-samples"][chosen.name]
    metrics = read_metrics(chosen, task, results)
    return TaskScore(
        task=chosen.name,
        version=str(results["versions"].get(chosen.name)),
        metrics=metrics,
        accuracy=accuracy_of(metrics),
        shots=int(results["n-shot"].get(chosen.name, 0)),
        examples=examples,
        examples_measured=examples_measured,
        samples=int(counts["effective"]),
        samples_total=int(counts["original"]),
    )


def _run(model: MeasuredModel, name: str, task: Any, limit: int | None, chat_template: bool) -> Any:
    """Results of a task, as lm-eval returns them."""
    model.task = name
    try:
        # simple_evaluate would collect particulars of the machine for seconds. The bootstrap is of no use for
        # accuracies, and starts processes.
        return evaluate(
            lm=model,
            # The name that was asked for: reading the task's own name draws a random number.
            task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat_template,
            # As in lm-eval's command, each example is a turn of the conversation.
            fewshot_as_multiturn=chat_template,
        )
    except SurgeonError:
        raise
    except Exception as error:
        logger.debug("the task %s failed", name, exc_info=True)
        raise ConfigError(
            f"The task {name} failed: {one_line(error)}.",
            "Check that its file and its data fit together, and that the model can do what it asks for.",
        ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed every global generator that the code of a task may use, and restore their states afterwards."""
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


class MeasuredModel(HFLM):  # type: ignore[misc]  # lm-eval is not typed
    """Model that answers the requests of tasks, and is not changed by it; to be used under ``frozen``.

    Args:
        model: A causal language model.
        tokenizer: Tokenizer of the model; a copy is used, because lm-eval gives it a padding token.
        batch_size: Requests per pass.
        precision: ``bfloat16`` (autocast) or ``float32``.
        progress: Display of the progress.

    Attributes:
        task: Name of the task that is measured.

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
        super().__init__(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            backend="causal",
            mixed_precision_dtype="bfloat16" if precision == "bfloat16" else None,
            softmax_dtype="float32",
            prefix_token_id=_token_of_text(model, tokenizer, "bos_token_id", "eos_token_id"),
        )
        self.task = ""
        self._progress = progress
        self._windows: Phase

    @property
    def eot_token_id(self) -> int:
        """Token that ends generated text, also where only the model's configuration has one."""
        return _token_of_text(self.model, self.tokenizer, "eos_token_id", "bos_token_id")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in nats."""
        tokens = sum(len(self.tok_encode(request.args[0])) for request in requests)
        with self._progress.phase(self.task, tokens) as self._windows:
            sums: list[float] = super().loglikelihood_rolling(requests)
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context, and whether the model itself would choose it."""
        answers: list[tuple[float, bool]]
        if all(text is None for text, _, _ in requests):
            # Windows of whole texts come in one batch per call, without their text.
            answers = super()._loglikelihood_tokens(requests, override_bs=override_bs)
            self._windows.advance(sum(len(continuation) for _, _, continuation in requests))
        else:
            self._say_what_is_cut(requests)
            sizes = {text: len(context) + len(continuation) for text, context, continuation in requests if text}
            total = sum(len(context) + len(continuation) for _, context, continuation in requests)
            with self._counted(lambda request: sizes.get(request, 0), total):
                answers = super()._loglikelihood_tokens(requests)
        if any(math.isnan(value) for value, _ in answers):
            raise NonFiniteError(
                f"A log-likelihood that the task {self.task} asks for is not a number.",
                "Evaluate with --precision float32, or check the model's weights.",
            )
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a text for each request; progress counts the tokens that the model reads."""
        sizes = {request.args[0]: len(self.tok_encode(request.args[0])) for request in requests}
        with self._counted(lambda request: sizes[request[0]], sum(sizes[request.args[0]] for request in requests)):
            texts: list[str] = super().generate_until(requests)
        return texts

    @contextmanager
    def _counted(self, size: Callable[[Any], int], total: int) -> Iterator[None]:
        """Show a phase of ``total`` tokens, which advances by the size of each request that is answered."""
        with self._progress.phase(self.task, total) as phase:
            self.set_cache_hook(_Answers(lambda request: phase.advance(size(request))))
            try:
                yield
            finally:
                self.set_cache_hook(CacheHook(None))

    def _say_what_is_cut(self, requests: Sequence[Request]) -> None:
        # The last token is scored but not read, so one token more than the model's length fits.
        long = sum(len(context) + len(continuation) > self.max_length + 1 for _, context, continuation in requests)
        if long:
            logger.warning(
                "%s: %d of %d requests are longer than the model's %d tokens; their beginning is left out",
                *(self.task, long, len(requests), self.max_length),
            )


class _Answers(CacheHook):  # type: ignore[misc]  # lm-eval is not typed
    """Cache of lm-eval that stores nothing and reports every request as it is answered."""

    def __init__(self, tell: Callable[[Any], None]) -> None:
        super().__init__(None)
        self._tell = tell

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._tell(req)


def _token_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *names: str) -> int:
    """First token that the tokenizer, or else the model's configuration, has under one of the names.

    An answer without a question is preceded by the token that begins a text, or else by the one that ends it.

    Raises:
        ModelError: If there is no such token.
    """
    for holder in (tokenizer, model.config, model.config.get_text_config()):
        for name in names:
            token = getattr(holder, name, None)
            if isinstance(token, int):
                return token
    raise ModelError(
        "Neither the tokenizer nor the model's configuration has a token that begins or ends a text.",
        "Set bos_token in the tokenizer's configuration.",
    )
