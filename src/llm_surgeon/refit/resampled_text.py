"""Resampled text: copies of the calibration text in which the model itself has written some of the tokens.

Least squares need inputs and no labels. Where calibration tokens are few, a fit to them says little about other text.
In a copy of a sequence, some tokens are drawn from the dense model's own prediction, given the tokens that really
precede them. The model finds such text likely and has not been fitted to it yet. A copy takes one forward pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.modes import arithmetic, fast_pass
from llm_surgeon.passes.batch_major import Advance, Estimation
from llm_surgeon.passes.draws import draws_of
from llm_surgeon.passes.head import label_positions, last_states, sample_labels


def with_copies(
    model: PreTrainedModel,
    tokens: CalibrationTokens,
    copies: int,
    share: float,
    how: Estimation,
    advance: Advance = lambda _tokens: None,
) -> CalibrationTokens:
    """Calibration tokens and, after them, copies in which a share of the tokens is drawn from the model.

    The draws depend on the number of each sequence and of its copy, neither on batches nor on processes.

    Args:
        model: The dense model.
        tokens: Calibration tokens of this process.
        copies: Number of copies of each sequence.
        share: Probability of each token to be replaced; the first token of a sequence stays.
        how: Batches, precision and seed.
        advance: Function that is called with the number of tokens after each batch of each copy.

    Returns:
        ``(copies + 1) * samples`` sequences.

    Raises:
        NonFiniteError: If the model's predictions are not finite.
    """
    parts = [tokens.input_ids]
    for copy in range(1, copies + 1):
        drawn = replace(how, seed=how.seed + copy)
        parts.append(_resampled(model, tokens, share, drawn, advance))
    mask = tokens.attention_mask
    masks = None if mask is None else mask.repeat(copies + 1, 1)
    return CalibrationTokens(torch.cat(parts), masks, tokens.provenance, tokens.first)


@torch.no_grad()
def _resampled(
    model: PreTrainedModel, tokens: CalibrationTokens, share: float, how: Estimation, advance: Advance
) -> Tensor:
    """Tokens of one copy of the sequences, ``[samples, length]``."""
    device = next(model.parameters()).device
    rows, sequence = [], tokens.first
    bos = tokens.provenance.get("bos")
    begins = -1 if bos is None else bos
    with fast_pass(model, how.precision):
        for input_ids, mask in tokens.batches(how.batch_size):
            ids = input_ids.to(device)
            with arithmetic(device, how.precision):
                states = last_states(model, ids, None if mask is None else mask.to(device))
                positions, labels = label_positions(ids, None if mask is None else mask.to(device))
                # Two draws for each token: one decides whether it is replaced, the other its replacement.
                draws = draws_of(input_ids.shape, sequence, 2, how.seed).to(device)[positions]
                written = sample_labels(model, states.index_select(0, positions), draws[:, 1:])[0]
            flat = ids.flatten().clone()
            # The token that begins a window within a sequence stays: for the model, nothing precedes it.
            redrawn = (draws[:, 0] < share) & (labels != begins)
            # The prediction at a position is for the next position.
            flat[positions + 1] = torch.where(redrawn, written, labels)
            rows.append(flat.view_as(ids).to(input_ids.device))
            sequence += len(input_ids)
            advance(input_ids.numel())
    return torch.cat(rows)
