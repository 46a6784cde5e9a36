"""Kullback-Leibler divergence of a pruned model's predictions from the dense model's, token by token.

The dense model's predictions are kept as its last hidden states, which are some hundred times smaller than the logits,
and are turned into logits a few at a time. The head is never pruned, so the pruned model's head serves for both. Only
where the channels of the residual stream were reordered does it expect them in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.passes import head as heads
from llm_surgeon.records import Perplexity

ToLogits = Callable[[Tensor], Tensor]


@torch.no_grad()
def kl_divergence(dense_head: ToLogits, head: ToLogits, dense: Tensor, states: Tensor) -> float:
    """Sum over positions of KL(dense || pruned) = sum of p_dense (log p_dense - log p_pruned), in nats.

    Args:
        dense_head: Makes logits of the dense model's hidden states.
        head: Makes logits of the pruned model's hidden states.
        dense: ``[n, width]`` last hidden states of the dense model.
        states: ``[n, width]`` last hidden states of the pruned model at the same positions.

    Returns:
        The sum, never negative.
    """
    total = states.new_zeros((), dtype=torch.float64)
    for start in range(0, len(states), heads.CHUNK):
        part = slice(start, start + heads.CHUNK)
        for expected, actual in heads.few_rows(dense_head(dense[part]), head(states[part])):
            aims, made = expected.float().log_softmax(-1), actual.float().log_softmax(-1)
            positions = F.kl_div(made, aims, reduction="none", log_target=True).sum(-1)
            # Only rounding can make the divergence of a position negative.
            total += positions.clamp(min=0).double().sum()
    return float(total)


def reference_states(
    model: PreTrainedModel, text: EvaluationText, advance: Callable[[int], None] = lambda _tokens: None
) -> tuple[Perplexity, Tensor]:
    """Perplexity of the dense model, and the hidden states that its predictions can be computed from.

    Args:
        model: The dense model.
        text: The text to measure on.
        advance: Called with the number of tokens after each window.

    Returns:
        The perplexity, and the last hidden states ``[tokens, width]`` of the positions it scores, in the order of the
        windows, on the CPU.

    Raises:
        NonFiniteError: If the model's loss is not finite.
    """
    parts: list[Tensor] = []
    measured = perplexity(model, text, advance, lambda states: parts.append(states.cpu()))
    return measured, torch.cat(parts)


def perplexity_and_divergence(
    model: PreTrainedModel,
    text: EvaluationText,
    dense: Tensor,
    advance: Callable[[int], None] = lambda _tokens: None,
    dense_head: ToLogits | None = None,
) -> tuple[Perplexity, float]:
    """Perplexity of a pruned model and its divergence from the dense one, in one pass over the text.

    Args:
        model: The pruned model.
        text: The text that ``dense`` was computed on.
        dense: ``[tokens, width]``, the states from ``reference_states``.
        advance: Called with the number of tokens after each window.
        dense_head: The dense model's head; the pruned model's own if None.

    Returns:
        The perplexity, and the divergence in nats, its mean over the tokens that the perplexity scores.

    Raises:
        NonFiniteError: If the model's loss is not finite.
        ValueError: If ``dense`` has another number of positions than the text scores.
    """
    sizes = [text.window - first for _, first in text.windows]
    if len(dense) != sum(sizes):
        raise ValueError(f"The reference has {len(dense)} positions, the text {sum(sizes)}.")
    remaining, total = iter(dense.split(sizes)), 0.0

    def compare(states: Tensor) -> None:
        nonlocal total
        own = heads.Head(model)
        total += kl_divergence(dense_head or own, own, next(remaining).to(states.device), states)

    measured = perplexity(model, text, advance, compare)
    return measured, total / sum(sizes)
