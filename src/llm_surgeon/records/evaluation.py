"""Records of evaluation: perplexity, tasks, speed."""

from __future__ import annotations

from llm_surgeon.records.base import Record


class SourcePerplexity(Record):
    """Token perplexity of one of several texts, with the number of its windows."""

    data: str
    perplexity: float
    nll: float
    windows: int


class Perplexity(Record):
    """Token perplexity, and how it was measured.

    ``tokens`` counts the scored targets; ``nll`` is their mean negative log-likelihood in nats, averaged over windows.
    ``bos`` says whether each window begins with the token that begins a text. Where the text is joined of several,
    ``sources`` has the perplexity of each, and ``nll`` is the mean of theirs by the shares of the texts.
    """

    perplexity: float
    nll: float
    tokens: int
    window: int
    stride: int
    data: str
    precision: str
    bos: bool = False
    sources: tuple[SourcePerplexity, ...] = ()


class TaskMetric(Record):
    """One metric of a task; the standard error is known if the metric is a mean over the samples."""

    value: float
    stderr: float | None


class TaskScore(Record):
    """Scores of one task.

    ``metrics`` have lm-eval's names, followed by ``,filter`` where the task filters its answers. ``accuracy`` names the
    metric that enters the mean over the tasks; it is None if no metric is an accuracy. The ``shots`` solved examples
    before each question are drawn from ``examples`` documents, of which ``examples_measured`` are measured themselves.
    """

    task: str
    version: str
    metrics: dict[str, TaskMetric]
    accuracy: str | None
    shots: int
    examples: int = 0
    examples_measured: int = 0
    samples: int
    samples_total: int


class TaskFailure(Record):
    """A task that could not be measured, and why."""

    task: str
    cause: str
    remedy: str


class TaskScores(Record):
    """Scores of the tasks of lm-eval, and how they were measured.

    ``mean`` is the plain mean of the accuracies of the tasks that have one and did not fail; each task counts the same.
    It is None if there is no accuracy. ``seed`` is for the solved examples and for all else that a task draws.
    ``chat_template`` says whether questions and examples were put into the tokenizer's chat template.
    """

    scores: tuple[TaskScore, ...]
    failures: tuple[TaskFailure, ...]
    mean: float | None
    limit: int | None
    batch_size: int
    seed: int
    chat_template: bool = False
    precision: str
    lm_eval: str


class Evaluation(Record):
    """Measures of ``llm-surgeon eval`` of one model; its ``--out`` is this record."""

    model: str
    perplexity: Perplexity | None
    tasks: TaskScores | None


class Speed(Record):
    """Tokens per second of one model: prefill of ``prompt`` tokens, then decoding with its cache; medians."""

    prefill: float
    decode: float
    prompt: int
    generated: int
    batch: int
    repeats: int
    device: str
    dtype: str


class SpeedComparison(Record):
    """Dense and pruned model timed in alternating pairs; the ratios are medians over the pairs.

    The limits are the ratios that fewer multiplications would allow in prefill, and fewer weights to read in decoding.
    """

    dense: Speed
    pruned: Speed
    prefill_ratio: float
    decode_ratio: float
    prefill_limit: float | None = None
    decode_limit: float | None = None
