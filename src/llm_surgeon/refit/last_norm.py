"""The norm behind the last block, scaled by one number for predictions that are as sure as they are right.

``reconstruction.py`` says why they are not, and what the scale minimises.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from llm_surgeon.mathematics.least_squares import logit_scale
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.modes import arithmetic
from llm_surgeon.passes.head import head_sharpness, label_positions
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.system.processes import Processes

# So many tokens tell one number well enough: the scale to about 0.01.
_TOKENS = 4096
_OF_EACH = 8


def last_norm(model: nn.Module, anatomy: Anatomy) -> nn.Module | None:
    """The norm behind the last block, if the model has one."""
    try:
        return model.get_submodule(anatomy.family.residual.final_norm)
    except AttributeError:
        return None


def last_norm_parameters(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """Names of its parameters."""
    norm, path = last_norm(model, anatomy), anatomy.family.residual.final_norm
    return [] if norm is None else [f"{path}.{name}" for name, _ in norm.named_parameters()]


def scale_last_norm(
    model: PreTrainedModel, anatomy: Anatomy, stream: Sweep, text: int, precision: str, processes: Processes
) -> float:
    """Scale the last norm, in place.

    Args:
        model: The model.
        anatomy: Says where the norm is.
        stream: The model's calibration tokens, behind its last block; they stay there.
        text: How many of the sequences, the first ones, are text whose next tokens are right.
        precision: ``bfloat16`` or ``float32`` arithmetic.
        processes: Who has the other tokens.

    Returns:
        The scale; 1 for a model without such a norm, or with one that is not in proportion to its parameters.
    """
    norm = last_norm(model, anatomy)
    if norm is None:
        return 1.0
    return _scaled(norm, logit_scale(*_sharpness(model, stream, text, precision, processes)))


def _sharpness(
    model: PreTrainedModel, stream: Sweep, text: int, precision: str, processes: Processes
) -> tuple[float, float]:
    """First and second derivative of the mean loss by the scale, over some of the text's tokens."""
    length = stream.batches[0].input_ids.shape[1]
    # The same tokens of a sequence whatever batch or process it is in; some of each, however many there are, as the
    # first one, which has nothing before it, says little of the others.
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
    """Scale what a norm puts out, and return the scale; a norm not in proportion to its parameters (Gemma) stays."""
    parameters = list(norm.parameters())
    if not parameters:
        return 1.0
    probe = torch.linspace(-1, 1, parameters[0].numel(), device=parameters[0].device, dtype=parameters[0].dtype)
    unscaled, before = norm(probe).float(), [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.data * scale
    missed = norm(probe).float() - scale * unscaled
    # Half of the change is more than the rounding of weights, unless they do not change at all.
    if float(missed.norm()) <= 0.5 * abs(1 - scale) * float(unscaled.norm()):
        return scale
    for parameter, data in zip(parameters, before, strict=True):
        parameter.data = data
    return 1.0
