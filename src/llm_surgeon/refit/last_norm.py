"""Scale of the norm behind the last block: one number, for predictions that are as sure as they are right.

``mathematics.least_squares`` says why predictions are not that after reconstruction, and what the scale minimises.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.mathematics.least_squares import logit_scale
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.modes import arithmetic
from llm_surgeon.passes.head import head_sharpness, label_positions
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.system.processes import Processes

# Number of tokens that give the scale to about 0.01, and of tokens to take of each sequence at least.
_TOKENS = 4096
_OF_EACH = 8


def last_norm(model: nn.Module, anatomy: Anatomy) -> nn.Module | None:
    """The norm behind the last block; None if the model has none."""
    try:
        return model.get_submodule(anatomy.family.residual.final_norm)
    except AttributeError:
        return None


def last_norm_parameters(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Names of the parameters of the norm behind the last block."""
    norm, path = last_norm(model, anatomy), anatomy.family.residual.final_norm
    return [] if norm is None else [f"{path}.{name}" for name, _ in norm.named_parameters()]


def scale_last_norm(
    model: PreTrainedModel, anatomy: Anatomy, stream: Sweep, text: int, precision: str, processes: Processes
) -> float:
    """Scale the norm behind the last block, in place.

    Args:
        model: The model.
        anatomy: Anatomy of the model, whose family names the norm.
        stream: Sweep of the calibration tokens, which is behind the last block and stays there.
        text: Number of sequences, from the first on, that are real text rather than copies.
        precision: ``bfloat16`` or ``float32`` arithmetic.
        processes: Processes that share the tokens.

    Returns:
        The scale; 1 if the model has no such norm, or one whose output is not in proportion to its parameters.
    """
    norm = last_norm(model, anatomy)
    if norm is None:
        return 1.0
    return _scaled(norm, logit_scale(*_sharpness(model, stream, text, precision, processes)))


def _sharpness(
    model: PreTrainedModel, stream: Sweep, text: int, precision: str, processes: Processes
) -> tuple[float, float]:
    """First and second derivative of the mean loss with respect to the scale, over some of the text's tokens."""
    length = stream.batches[0].input_ids.shape[1]
    # The positions are the same in each sequence, whatever batch or process it is in. Several of each sequence are
    # taken, as the first token, which nothing precedes, says little of the others.
    every = max(1, min(round(processes.total(text * length)[0]) // _TOKENS, length // _OF_EACH))
    first, sums = 0, [0.0, 0.0, 0.0]
    for batch in stream.batches:
        positions, labels = label_positions(batch.input_ids, batch.attention_mask)
        chosen = (positions % length % every == 0) & (positions < (text - first) * length)
        first += len(batch.input_ids)
        if bool(chosen.any()):
            with torch.no_grad(), arithmetic(batch.input_ids.device, precision):
                states = stream.last_states(batch, batch.hidden.get())[positions[chosen]]
                found = (*head_sharpness(model, states, labels[chosen]), float(chosen.sum()))
            sums = [total + part for total, part in zip(sums, found, strict=True)]
    slope, curvature, count = processes.total(*sums)
    return (slope / count, curvature / count) if count else (0.0, 0.0)


@torch.no_grad()
def _scaled(norm: nn.Module, scale: float) -> float:
    """Scale a norm's output by its parameters, and return the scale; a norm of neither kind that is known stays."""
    parameters = list(norm.parameters())
    if not parameters:
        return 1.0
    probe = torch.linspace(-1, 1, parameters[0].numel(), device=parameters[0].device, dtype=parameters[0].dtype)
    unscaled, before = norm(probe).float(), [parameter.data for parameter in parameters]

    def output(factor: float, one: float) -> Tensor:
        for parameter, data in zip(parameters, before, strict=True):
            parameter.data = (data + one) * factor - one
        result: Tensor = norm(probe).float()
        return result

    # The output is in proportion to the parameters, or to the parameters and 1 (Gemma's norms, and Qwen 3.5's).
    for one in (0.0, 1.0):
        if not bool(output(0.0, one).any()):
            missed = output(scale, one) - scale * unscaled
            # Half of the change is more than the rounding of weights, unless they do not change at all.
            if float(missed.norm()) <= 0.5 * abs(1 - scale) * float(unscaled.norm()):
                return scale
    for parameter, data in zip(parameters, before, strict=True):
        parameter.data = data
    return 1.0
