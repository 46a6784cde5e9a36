"""Divergence of a student's predictions from a teacher's, of which the likeliest tokens may be enough.

The loss of knowledge distillation (Hinton, Vinyals and Dean, 2015) is ``T^2 KL(p || q)`` at each position, with the
teacher's probabilities ``p = softmax(t / T)``, the student's ``q = softmax(s / T)`` and a temperature ``T``. The factor
``T^2`` keeps the size of the gradients, which are ``T (q - p)`` by the logits.

A vocabulary has 10^5 tokens, and nearly all probability lies on a few of them. With the teacher's ``k`` likeliest
tokens ``I`` and all others taken together as one, ``p_0 = 1 - sum_I p_i``, the divergence is

    KL_k = sum_I p_i log(p_i / q_i) + p_0 log(p_0 / q_0),

the divergence of two distributions of ``k + 1`` outcomes. By the log sum inequality it is at most ``KL(p || q)``; it is
zero where the student has the teacher's probabilities of ``I``. Without the last term, a student could gain by putting
probability on tokens that the teacher holds unlikely.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Outcomes(NamedTuple):
    """Logarithms of a teacher's probabilities, float32.

    Attributes:
        logs: ``[n, k]``, of the likeliest tokens, or ``[n, vocabulary]`` of all in their order.
        tokens: ``[n, k]``, which tokens these are; None for all.
        rest: ``[n]``, of all other tokens together; None for all tokens.
    """

    logs: Tensor
    tokens: Tensor | None = None
    rest: Tensor | None = None

    def at(self, part: slice) -> Outcomes:
        """Outcomes at some positions."""
        tokens, rest = (None if tensor is None else tensor[part] for tensor in (self.tokens, self.rest))
        return Outcomes(self.logs[part], tokens, rest)


def likeliest(logits: Tensor, count: int | None, temperature: float = 1.0) -> Outcomes:
    """A teacher's probabilities of its likeliest tokens, and of all others together.

    Args:
        logits: ``[n, vocabulary]``.
        count: Number of tokens to keep at each position; None, or as many as the vocabulary has, keeps all.
        temperature: Temperature, above 0.
    """
    scaled = _scaled(logits, temperature)
    if count is None or count >= logits.shape[-1]:
        return Outcomes(scaled.log_softmax(-1))
    kept, tokens = scaled.topk(count, dim=-1)
    whole = scaled.logsumexp(-1)
    return Outcomes(kept - whole[:, None], tokens, _without(scaled, tokens).logsumexp(-1) - whole)


def divergence(logits: Tensor, teacher: Outcomes, temperature: float = 1.0) -> Tensor:
    """Sum over positions of ``T^2 KL(teacher || student)``, in nats, of what the teacher tells.

    Args:
        logits: ``[n, vocabulary]``, the student's.
        teacher: The teacher's probabilities at this temperature.
        temperature: Temperature, above 0.
    """
    scaled = _scaled(logits, temperature)
    if teacher.tokens is None or teacher.rest is None:
        return temperature**2 * _divergence(teacher.logs, scaled.log_softmax(-1))
    whole = scaled.logsumexp(-1)
    kept = scaled.gather(-1, teacher.tokens) - whole[:, None]
    # The sum over the others is one of exponentials: as 1 minus the kept ones it would be rounding where it is small.
    rest = _without(scaled, teacher.tokens).logsumexp(-1) - whole
    return temperature**2 * (_divergence(teacher.logs, kept) + _divergence(teacher.rest, rest))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    values = logits.float()
    return values if temperature == 1.0 else values / temperature


def _divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum of ``p log(p / q)`` over all outcomes, of logarithms."""
    return (teacher.exp() * (teacher - student)).sum()


def _without(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logits with those of some tokens at minus infinity, as if their probabilities were 0."""
    return logits.scatter(-1, tokens, float("-inf"))
