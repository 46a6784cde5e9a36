"""First-order corrections after a shot: low-rank adapters, trained for a short while and absorbed.

The adapters are absorbed after each shot, so the change by all shots together may have a higher rank than each adapter.
An adapter sits on the weights that pruning has left: on the smaller matrix if rows and columns are removed, and under
the mask of kept weights if single weights are removed, in training as in the result.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError, NonFiniteError
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.modeling_pruned import PrunedLinear
from llm_surgeon.models.modes import arithmetic, frozen
from llm_surgeon.passes.head import backward, label_positions, last_states


@dataclass(frozen=True)
class Corrections:
    """Options of first-order corrections.

    Attributes:
        rank: Rank of each layer's adapter.
        learning_rate: Highest learning rate of AdamW; it rises over the first tenth of the steps and falls to zero.
        steps: Number of optimizer steps, one batch each.
    """

    rank: int = 16
    learning_rate: float = 1e-3
    steps: int = 32

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: If a value is out of range.
        """
        if self.rank < 1 or self.steps < 1 or not self.learning_rate > 0:
            raise ConfigError(
                f"Corrections cannot be made with {self}.",
                "Rank and steps are at least 1, the learning rate is above 0.",
            )


@dataclass(frozen=True)
class Corrected:
    """The result of corrections: number of steps, and mean losses of the first and the last batch in nats."""

    steps: int
    first_loss: float
    last_loss: float


def require_peft() -> None:
    """Check, before any work, that corrections are possible.

    Raises:
        ConfigError: If the optional package ``peft`` is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "First-order corrections need the package peft, which is not installed.",
            'Install it with `pip install "llm-surgeon[lora]"`, or prune without corrections.',
        )


def correct(
    model: PreTrainedModel,
    anatomy: Anatomy,
    masks: Mapping[str, Tensor] | None,
    tokens: CalibrationTokens,
    how: Corrections,
    *,
    batch_size: int,
    precision: str,
    seed: int,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> Corrected:
    """Train low-rank adapters on every prunable layer and absorb them into the weights, in place.

    The loss is the mean negative log-likelihood of the next tokens. Biases, removed weights and all other parameters
    do not change. After an error no weight has changed. An interrupt while the corrected weights are written may leave
    some layers corrected and others not.

    Args:
        model: The model, as pruned so far.
        anatomy: Prunable layers of the model.
        masks: Masks ``[rows, columns]`` bool, True = kept, of layers with single weights removed, by name; None if only
            rows and columns are removed.
        tokens: Calibration tokens.
        how: Rank, learning rate and steps.
        batch_size: Number of sequences per step.
        precision: ``bfloat16`` or ``float32`` arithmetic; adapters and optimizer are float32 in any case.
        seed: Seed of the adapters' random factors and of the order of the sequences.
        advance: Function that is called with the number of tokens after each step: ``steps * batch_size * seq_len`` in
            total.

    Returns:
        Number of steps, and the mean losses of the batches of the first and the last step.

    Raises:
        ConfigError: If peft is not installed, a mask does not fit its layer, or no weights are left.
        NonFiniteError: If the loss or a corrected weight is not finite.

    Source: LLM Surgeon (van der Ouderaa et al., ICLR 2024), interleaved low-rank first-order corrections, with the
    adapters of LoRA (Hu et al., ICLR 2022).
    """
    require_peft()
    from llm_surgeon.refit import adapters

    targets = _targets(model, anatomy, masks or {})
    losses = []
    with frozen(model), adapters.attached(model, targets, how.rank, seed) as layers:
        factors = [factor for layer in layers for factor in layer.factors()]
        optimizer = torch.optim.AdamW(factors, lr=how.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, how.steps))
        for input_ids, attention_mask in _batches(tokens, how, batch_size, seed):
            losses.append(_step(model, optimizer, input_ids, attention_mask, precision))
            schedule.step()
            advance(input_ids.numel())
        adapters.absorb(layers)
    return Corrected(steps=how.steps, first_loss=losses[0], last_loss=losses[-1])


def _targets(model: PreTrainedModel, anatomy: Anatomy, masks: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Masks of the prunable layers, by the module that holds the layer's weights; empty layers are left out."""
    targets: dict[str, Tensor | None] = {}
    for name, layer in anatomy.layers.items():
        weight, mask = core_of(model, layer).weight, masks.get(name)
        if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
            raise ConfigError(
                f"The mask of {name} is {mask.dtype} of shape {tuple(mask.shape)}.",
                f"Give a bool tensor of shape {tuple(weight.shape)}, True for kept weights.",
            )
        if weight.numel():
            pruned = isinstance(model.get_submodule(name), PrunedLinear)
            targets[f"{name}.core" if pruned else name] = mask
    if not targets:
        raise ConfigError("Every prunable layer is empty, so there is nothing to correct.", "Prune less.")
    return targets


def _batches(
    tokens: CalibrationTokens, how: Corrections, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches of all steps from the shuffled sequences, over and over."""
    order = torch.randperm(tokens.n_samples, generator=torch.Generator().manual_seed(seed))
    for step in range(how.steps):
        rows = order[torch.arange(step * batch_size, (step + 1) * batch_size) % len(order)]
        yield tokens.input_ids[rows], None if tokens.attention_mask is None else tokens.attention_mask[rows]


def _rate(step: int, steps: int) -> float:
    """Fraction of the highest learning rate: up over the first tenth of the steps, down to zero over all steps."""
    return min(1.0, (step + 1) / max(1, steps // 10)) * (1 - step / steps)


def _step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    precision: str,
) -> float:
    """Take one optimizer step, and return the mean loss of its batch before it."""
    device = next(model.parameters()).device
    input_ids = input_ids.to(device)
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    positions, labels = label_positions(input_ids, attention_mask)
    count = max(1, len(labels))
    # Autocast keeps its copies of the factors until it ends, so it has to end before they change.
    with arithmetic(device, precision):
        states = last_states(model, input_ids, attention_mask)
        loss = backward(model, states, positions, labels) / count
    if not math.isfinite(loss):
        raise NonFiniteError(
            "The loss of the first-order corrections is not finite, so they were dropped.",
            "Use a lower learning rate for the corrections, or run with --precision float32 and --dtype float32.",
        )
    # The backward pass is of the sum, and float32 gradients are divided here: the mean's would be too small in float16.
    for group in optimizer.param_groups:
        for factor in group["params"]:
            factor.grad /= count
    optimizer.step()
    optimizer.zero_grad()
    return loss
