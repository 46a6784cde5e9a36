"""The language-model head: labels, summed negative log-likelihood and its gradient, a few logits at a time."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from llm_surgeon.errors import NonFiniteError
from llm_surgeon.linalg import is_finite

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


def head_of(model: PreTrainedModel, own_copy: bool = False) -> Callable[[Tensor], Tensor]:
    """What turns last hidden states ``[n, width]`` into logits ``[n, vocabulary]`` in float32.

    That is the output embedding, and with some families (Gemma 2) a cap on the logits.

    Args:
        model: A causal language model.
        own_copy: Whether the weights are copied, so that later changes of the model do not matter.
    """
    head, cap = model.get_output_embeddings(), getattr(model.config, "final_logit_softcapping", None)
    head = deepcopy(head) if own_copy else head

    def logits(states: Tensor) -> Tensor:
        values: Tensor = head(states).float()
        return values if cap is None else cap * torch.tanh(values / cap)

    return logits


def head_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor, gradient: Tensor | None = None) -> float:
    """Sum of the negative log-likelihoods of some positions, and if asked its gradient at their last hidden states.

    Args:
        model: A causal language model whose logits ``head_of`` makes of its last hidden states.
        hidden: ``[n, width]`` last hidden states.
        labels: ``[n]`` next tokens.
        gradient: ``[n, width]``, filled with the gradient; None computes none.

    Returns:
        The sum in nats.
    """
    head, total = head_of(model), 0.0
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        with torch.set_grad_enabled(gradient is not None):
            states = hidden[part].detach().requires_grad_(gradient is not None)
            loss = F.cross_entropy(head(states), labels[part], reduction="sum")
        if gradient is not None:
            (gradient[part],) = torch.autograd.grad(loss, states)
        total += float(loss.detach())
    return total


def last_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The last hidden states of ``input_ids [batch, length]``, flat as ``label_positions`` counts them.

    Args:
        model: A causal language model, see ``head_loss``.
        input_ids: ``[batch, length]``.
        attention_mask: ``[batch, length]``, True for real tokens, or None if all are.

    Returns:
        ``[batch * length, width]``.
    """
    mask = None if attention_mask is None else attention_mask.long()
    hidden: Tensor = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])


def backward(
    model: PreTrainedModel, states: Tensor, positions: Tensor, labels: Tensor, keep_graph: bool = False
) -> float:
    """Back-propagate the sum of the negative log-likelihoods to whatever the last hidden states depend on.

    Args:
        model: A causal language model, see ``head_loss``.
        states: ``[batch * length, width]`` last hidden states with their graph.
        positions: ``[n]`` of those that have a label.
        labels: ``[n]`` next tokens.
        keep_graph: Whether the graph is needed once more.

    Returns:
        The sum in nats.
    """
    last = states.detach().index_select(0, positions)
    gradient = torch.empty_like(last)
    loss = head_loss(model, last, labels, gradient)
    whole = torch.zeros_like(states).index_copy_(0, positions, gradient)
    torch.autograd.backward(states, whole, retain_graph=keep_graph)
    return loss


@torch.no_grad()
def sample_labels(model: PreTrainedModel, hidden: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Next tokens drawn from the model's own prediction.

    Args:
        model: As for ``head_loss``.
        hidden: ``[n, width]`` last hidden states.
        samples: Draws per position, with replacement.
        generator: On the device of ``hidden``.

    Returns:
        ``[samples, n]``.

    Raises:
        NonFiniteError: If a prediction is not finite.
    """
    head = head_of(model)
    parts = []
    for start in range(0, len(hidden), CHUNK):
        probabilities = head(hidden[start : start + CHUNK]).softmax(-1)
        if not is_finite(probabilities):
            raise NonFiniteError(
                "The model's predictions for the calibration tokens are not finite.",
                "Run with --precision float32 and --dtype float32, or check the checkpoint's weights.",
            )
        parts.append(torch.multinomial(probabilities, samples, replacement=True, generator=generator))
    return torch.cat(parts).T
