"""Batch-major pass: each batch of the calibration tokens goes through the whole model, forward and if need be backward.

Hooks look on. Gradients are of the *summed* negative log-likelihood, so that costs of all layers are in the same unit.
The empirical Fisher takes the text's own next tokens as labels; the true Fisher samples them from the model's
prediction (Martens & Grosse 2015). No weight needs a gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.modes import arithmetic, fast_pass
from llm_surgeon.models.overflow import loss_not_finite
from llm_surgeon.passes.draws import TokenSample, draws_of
from llm_surgeon.passes.head import backward as back_propagate
from llm_surgeon.passes.head import head_loss, label_positions, last_states, sample_labels
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.recipe.methods import CurvatureName
from llm_surgeon.system.processes import ALONE, Processes

Advance = Callable[[int], None]
Order = Literal["batch-major", "layer-major"]


@dataclass(frozen=True)
class Estimation:
    """Options of a pass and of the curvature that is estimated in it.

    Attributes:
        batch_size: Sequences per batch.
        precision: ``bfloat16`` or ``float32`` arithmetic; sums are float32 in any case.
        curvature: Name of the approximation.
        sampled_labels: Labels drawn from the model per token (true Fisher); 0 takes the text's own (empirical).
        iterations: Power iterations of the nearest Kronecker products.
        gradient_share: Share of each sequence's tokens that gradient factors are summed over, see ``TokenSample``; 1
            takes all. For K-FAC only.
        seed: Seed of the sampled labels and tokens.
        order: ``batch-major`` takes each batch through the whole model, ``layer-major`` all batches through one block
            before the next, with one block's sums and activations at a time.
    """

    batch_size: int
    precision: str
    curvature: CurvatureName = "kfac"
    sampled_labels: int = 0
    iterations: int = 2
    gradient_share: float = 1.0
    seed: int = 0
    order: Order = "batch-major"


@dataclass(frozen=True)
class PassResult:
    """Result of a pass: mean negative log-likelihood in nats, number of labelled tokens, and gradients of each."""

    loss: float
    tokens: int
    gradients_per_token: int


def run_pass(
    model: PreTrainedModel,
    hooks: Hooks,
    tokens: CalibrationTokens,
    how: Estimation,
    advance: Advance = lambda _tokens: None,
    processes: Processes = ALONE,
    *,
    backward: bool,
) -> PassResult:
    """Run every batch through the model; hooks see inputs and, if ``backward``, gradients.

    Args:
        model: A causal language model.
        hooks: Hooks that look on.
        tokens: Calibration tokens of this process.
        how: Batches, precision and labels.
        advance: Called with the number of tokens after each batch.
        processes: Processes that read the other tokens.
        backward: Whether gradients are taken.

    Returns:
        The result, counted over the tokens of all processes.

    Raises:
        NonFiniteError: If the loss is not finite.
    """
    device = next(model.parameters()).device
    loss, count, sequence = 0.0, 0, tokens.first
    with fast_pass(model, how.precision), torch.set_grad_enabled(backward):
        if backward:
            hooks.start_graph_at(model.get_input_embeddings())
        for input_ids, attention_mask in tokens.batches(how.batch_size):
            batch = LabelledBatch(input_ids.to(device), None if attention_mask is None else attention_mask.to(device))
            hooks.positions = batch.positions
            hooks.sample, draws = sample_of(batch, sequence, how), label_draws(batch, sequence, how)
            sequence += len(input_ids)
            # Autocast is entered anew for each batch, as it keeps the rounded inputs of the head until it ends.
            # Scattered among the freed logits of earlier batches, they would leave no room there for the next logits,
            # and the memory of a pass would grow with every batch.
            with arithmetic(device, how.precision):
                loss += _run_batch(model, batch, backward, draws)
                if not math.isfinite(loss):
                    raise loss_not_finite(model, batch.input_ids, "the calibration tokens")
            count += len(batch.positions)
            advance(input_ids.numel())
    loss, counted = processes.total(loss, count)
    return PassResult(loss / counted, round(counted), how.sampled_labels or 1)


def sample_of(batch: LabelledBatch, first: int, how: Estimation) -> TokenSample | None:
    """Sample of the tokens that gradients are summed over; None takes all that have a label.

    Args:
        batch: The batch.
        first: Number of its first sequence among those of all processes.
        how: Share of the tokens, and the seed.
    """
    if how.gradient_share == 1:
        return None
    return TokenSample(batch.input_ids.shape, batch.positions, how.gradient_share, first, how.seed)


def label_draws(batch: LabelledBatch, first: int, how: Estimation) -> Tensor | None:
    """Random numbers to sample labels by, ``[n, samples]`` for the positions of a batch; None for the text's own.

    Args:
        batch: The batch.
        first: Number of its first sequence among those of all processes.
        how: Number of labels per token, and the seed.
    """
    if not how.sampled_labels:
        return None
    draws = draws_of(batch.input_ids.shape, first, how.sampled_labels, how.seed)
    return draws.to(batch.positions.device)[batch.positions]


class LabelledBatch:
    """Tokens of one batch ``[batch, length]`` with their labels.

    Attributes:
        positions: Flat positions with a label, ``[n]``.
        labels: The tokens that follow these positions, ``[n]``.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.positions, self.labels = label_positions(input_ids, attention_mask)


def _run_batch(model: PreTrainedModel, batch: LabelledBatch, backward: bool, draws: Tensor | None) -> float:
    """Run a batch through the model and, if wanted, back; returns the summed loss of the text's own labels, in nats.

    Args:
        model: The model.
        batch: The batch.
        backward: Whether gradients are wanted.
        draws: Random numbers to sample labels by, see ``sample_labels``; None takes the text's own labels.
    """
    states = last_states(model, batch.input_ids, batch.attention_mask)
    last = states.detach().index_select(0, batch.positions)
    if not backward:
        return head_loss(model, last, batch.labels)
    if draws is None:
        return back_propagate(model, states, batch.positions, batch.labels)
    for number, labels in enumerate(sample_labels(model, last, draws), start=1):
        back_propagate(model, states, batch.positions, labels, keep_graph=number < draws.shape[1])
    return head_loss(model, last, batch.labels)
