"""Records of a recovery: what was trained on, and the curves of loss and perplexity."""

from __future__ import annotations

from typing import Any

from llm_surgeon.records.base import Record
from llm_surgeon.records.evaluation import Perplexity


class RecoverySource(Record):
    """A text that was trained on: its tokens, the sequences that are of it, and how many times it was read."""

    source: str
    tokens: int
    sequences: int
    passes: float


class RecoveryLoss(Record):
    """Mean loss of the steps since the last such record, in nats per token, after so many tokens in all."""

    tokens: int
    loss: float


class RecoveryPoint(Record):
    """Held-out perplexity after so many tokens, and the seconds of training until then."""

    tokens: int
    perplexity: Perplexity
    seconds: float


class RecoveryCurves(Record):
    """Curves of a training so far. The first point is of the model before it."""

    losses: tuple[RecoveryLoss, ...] = ()
    points: tuple[RecoveryPoint, ...] = ()

    @property
    def best(self) -> RecoveryPoint | None:
        """Point with the lowest perplexity, the first of equals; None without any."""
        return min(self.points, key=lambda point: point.perplexity.nll, default=None)


class RecoveryRecord(Record):
    """Result of a recovery. ``recovery.json`` is this record.

    ``tokens`` is how many tokens were trained on, ``result_tokens`` after how many the weights of the result were. The
    two differ where the perplexity was better before the end. ``perplexity`` is that of the result in the type in which
    it is stored, the curve's are of float32 weights. ``teacher_perplexity`` is the dense model's; it is None without a
    teacher. Both are None without an evaluation. ``trained`` counts the trained parameters, ``parameters`` all.
    ``max_logit_difference`` and ``logit_scale`` are of the check of the files, see ``FormatRecord``.
    """

    model: str
    teacher: str | None
    config: dict[str, Any]
    sources: tuple[RecoverySource, ...]
    curves: RecoveryCurves
    teacher_perplexity: Perplexity | None
    tokens: int
    result_tokens: int
    stopped_early: bool
    trained: int
    parameters: int
    seconds: float
    peak_memory: int
    versions: dict[str, str]
    processes: int = 1
    max_logit_difference: float | None = None
    logit_scale: float | None = None
    perplexity: Perplexity | None = None
    command: str | None = None


class RecoveryIdentity(Record):
    """Identity of a recovery in its directory: another one cannot continue it.

    ``files`` are marks of the two models' files, ``texts`` is a digest of the tokens, ``config`` has every option.
    """

    files: dict[str, dict[str, str]]
    config: dict[str, Any]
    texts: str
    processes: int
