"""One pass over the calibration tokens, forward and if need be backward, with hooks taking what they need.

Gradients are of the *summed* negative log-likelihood, so that costs of all layers are in the same unit. The empirical
Fisher takes the text's own next tokens as labels; the true Fisher samples them from the model's prediction
(Martens & Grosse 2015). No weight needs a gradient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.curvature.hooks import Hooks
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.methods import CurvatureName
from llm_surgeon.models.head import backward as back_propagate
from llm_surgeon.models.head import head_loss, label_positions, last_states, sample_labels
from llm_surgeon.models.modes import arithmetic, fast_pass
from llm_surgeon.models.overflow import loss_not_finite
from llm_surgeon.processes import ALONE, Processes

Advance = Callable[[int], None]
Order = Literal["batch-major", "layer-major"]


@dataclass(frozen=True)
class Estimation:
    """How curvature is estimated.

    Attributes:
        batch_size: Sequences per pass.
        precision: ``bfloat16`` or ``float32`` arithmetic; sums are float32 in any case.
        curvature: Which approximation.
        sampled_labels: Labels drawn from the model per token (true Fisher); 0 takes the text's own (empirical).
        iterations: Power iterations of the nearest Kronecker products.
        seed: Seed of the sampled labels.
        order: ``batch-major`` takes each batch through the whole model, ``layer-major`` all batches through one block
            before the next, with one block's sums and activations at a time.
    """

    batch_size: int
    precision: str
    curvature: CurvatureName = "kfac"
    sampled_labels: int = 0
    iterations: int = 2
    seed: int = 0
    order: Order = "batch-major"


@dataclass(frozen=True)
class PassResult:
    """Mean negative log-likelihood of the text in nats, tokens with a label, and gradients taken of each."""

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

    The result counts the tokens of all processes.

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
            draws = draws_of(input_ids.shape, sequence, how).to(device)[batch.positions] if how.sampled_labels else None
            sequence += len(input_ids)
            # Until it ends, autocast keeps the rounded inputs of the head. Scattered among the freed logits of earlier
            # batches they leave no room there for the next ones, and the memory of a pass grows with every batch.
            with arithmetic(device, how.precision):
                loss += _run_batch(model, batch, backward, draws)
                if not math.isfinite(loss):
                    raise loss_not_finite(model, batch.input_ids, "the calibration tokens")
            count += len(batch.positions)
            advance(input_ids.numel())
    loss, counted = processes.total(loss, count)
    return PassResult(loss / counted, round(counted), how.sampled_labels or 1)


def draws_of(shape: Sequence[int], first: int, how: Estimation) -> Tensor:
    """Numbers in [0, 1) that the labels of a batch are drawn by: ``[batch * length, samples]``.

    Each sequence has a seed of its own, so that its labels depend neither on the batch nor on the process it is in.

    Args:
        shape: Sequences of the batch, and their length.
        first: Number of its first sequence among those of all processes.
        how: The seed, and how many labels are drawn for each token.
    """
    sequences, length = shape
    seeds = (random.Random(f"{how.seed} {first + row}").getrandbits(32) for row in range(sequences))
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    return torch.cat([torch.rand(length, how.sampled_labels, generator=generator) for generator in generators])


class LabelledBatch:
    """Tokens of one batch ``[batch, length]``, and where they have labels.

    Attributes:
        positions: Flat positions with a label, ``[n]``.
        labels: The tokens that follow there, ``[n]``.
    """

    def __init__(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        self.input_ids = input_ids
        self.attention_mask = attention_mask
        self.positions, self.labels = label_positions(input_ids, attention_mask)


def _run_batch(model: PreTrainedModel, batch: LabelledBatch, backward: bool, draws: Tensor | None) -> float:
    """Through the blocks and back; returns the summed loss of the text's own labels.

    Args:
        model: The model.
        batch: Its tokens.
        backward: Whether gradients are wanted.
        draws: What labels are to be sampled by, see ``sample_labels``; None takes the text's own.
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
