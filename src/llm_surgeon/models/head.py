"""The language-model head: labels, summed negative log-likelihood and its gradient, a few logits at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

# Tokens whose logits exist at once: a vocabulary of 50,000 in float32 makes 50 MB of these.
CHUNK = 256


def label_positions(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flat positions that have a next token to predict, and those next tokens.

    Args:
        input_ids: ``[batch, length]``.
        attention_mask: ``[batch, length]``, True for real tokens, or None if all are.

    Returns:
        Positions in the flattened batch ``[n]`` and their labels ``[n]``. The last position of a sequence and
        positions at or before padding have no label.
    """
    labelled = torch.ones_like(input_ids, dtype=torch.bool)
    labelled[:, -1] = False
    if attention_mask is not None:
        real = attention_mask.bool()
        labelled[:, :-1] = real[:, :-1] & real[:, 1:]
    positions = labelled.flatten().nonzero().flatten()
    return positions, input_ids.flatten()[positions + 1]


def head_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor, gradient: Tensor | None = None) -> float:
    """Sum of the negative log-likelihoods of some positions, and if asked its gradient at their last hidden states.

    Args:
        model: A causal language model whose logits are ``get_output_embeddings()`` of its last hidden state.
        hidden: ``[n, width]`` last hidden states.
        labels: ``[n]`` next tokens.
        gradient: ``[n, width]``, filled with the gradient; None computes none.

    Returns:
        The sum in nats.
    """
    head, total = model.get_output_embeddings(), 0.0
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        with torch.set_grad_enabled(gradient is not None):
            states = hidden[part].detach().requires_grad_(gradient is not None)
            loss = F.cross_entropy(head(states).float(), labels[part], reduction="sum")
        if gradient is not None:
            (gradient[part],) = torch.autograd.grad(loss, states)
        total += float(loss.detach())
    return total
