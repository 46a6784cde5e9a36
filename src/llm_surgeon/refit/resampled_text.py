"""Resampled text: copies of the calibration text in which the model itself has written some of the tokens.

Least squares need inputs and no labels. Where calibration tokens are few, a fit to them says little about other text.
In a copy of a sequence, some tokens are drawn from the dense model's own prediction, given the tokens that really
precede them. The model finds such text likely and has not been fitted to it yet. All copies together take one forward
pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.modes import arithmetic, fast_pass, reduced_weights
from llm_surgeon.passes.batch_major import Advance, Estimation
from llm_surgeon.passes.draws import draws_of
from llm_surgeon.passes.head import label_positions, last_states, sample_labels
from llm_surgeon.passes.layer_major import Repeated
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.system.storage import TensorStore


def with_copies(
    model: PreTrainedModel,
    blocks: str,
    tokens: CalibrationTokens,
    copies: int,
    share: float,
    how: Estimation,
    store: TensorStore | None = None,
    advance: Advance = lambda _tokens: None,
) -> CalibrationTokens:
    """Calibration tokens and, after them, copies in which a share of the tokens is drawn from the model.

    The draws depend on the number of each sequence and of its copy, neither on batches nor on processes.

    Args:
        model: The dense model.
        blocks: Path of its list of decoder blocks.
        tokens: Calibration tokens of this process.
        copies: Number of copies of each sequence.
        share: Probability of each token to be replaced; the first token of a sequence stays.
        how: Batches, precision, order and seed.
        store: Store of the hidden states of a layer-major pass.
        advance: Function that is called with numbers of tokens that add up to all tokens once.

    Returns:
        ``(copies + 1) * samples`` sequences.

    Raises:
        NonFiniteError: If the model's predictions are not finite.
    """
    parts: list[list[Tensor]] = [[] for _ in range(copies)]
    sequence, bos = tokens.first, tokens.provenance.get("bos")
    begins = -1 if bos is None else bos
    for ids, mask, states in _last_states(model, blocks, tokens, how, store, advance):
        with arithmetic(ids.device, how.precision):
            for copy, rows in enumerate(parts, start=1):
                rows.append(_resampled(model, ids, mask, states, _Draws(sequence, how.seed + copy, share, begins)))
        sequence += len(ids)
    mask = tokens.attention_mask
    masks = None if mask is None else mask.repeat(copies + 1, 1)
    together = torch.cat([tokens.input_ids, *(row for rows in parts for row in rows)])
    return CalibrationTokens(together, masks, tokens.provenance, tokens.first)


@torch.no_grad()
def _last_states(
    model: PreTrainedModel,
    blocks: str,
    tokens: CalibrationTokens,
    how: Estimation,
    store: TensorStore | None,
    advance: Advance,
) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
    """Yield token ids and mask of each batch ``[batch, length]``, and its last states ``[batch * length, H]``."""
    device = next(model.parameters()).device
    if store is None:
        with fast_pass(model, how.precision):
            for input_ids, attention_mask in tokens.batches(how.batch_size):
                ids, mask = input_ids.to(device), None if attention_mask is None else attention_mask.to(device)
                with arithmetic(device, how.precision):
                    states = last_states(model, ids, mask)
                advance(ids.numel())
                yield ids, mask, states
        return
    sweep = Sweep(model, blocks, tokens, how.batch_size, how.precision, store)
    seen = Repeated(advance, len(sweep))
    for block in range(len(sweep)):
        sweep.pass_through(block, seen.advance)
    store.keep_within(much=True)
    with reduced_weights(model.get_output_embeddings(), how.precision):
        for batch, leaving in sweep.entering():
            states = sweep.last_states(batch, leaving.get())
            leaving.release()
            yield batch.input_ids, batch.attention_mask, states


@dataclass(frozen=True)
class _Draws:
    """Draws of one copy of a batch.

    Attributes:
        first: Number of the first sequence of the batch.
        seed: Seed of the copy.
        share: Probability of each token to be replaced.
        begins: Token that begins each window within a sequence, and stays; -1 without one.
    """

    first: int
    seed: int
    share: float
    begins: int


def _resampled(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, states: Tensor, draws: _Draws) -> Tensor:
    """Tokens of one copy of a batch, ``[batch, length]`` on the CPU."""
    positions, labels = label_positions(ids, mask)
    # Two draws for each token: one decides whether it is replaced, the other its replacement.
    drawn = draws_of(ids.shape, draws.first, 2, draws.seed).to(ids.device)[positions]
    written = sample_labels(model, states.index_select(0, positions), drawn[:, 1:])[0]
    flat = ids.flatten().clone()
    # The token that begins a window within a sequence stays: for the model, nothing precedes it.
    redrawn = (drawn[:, 0] < draws.share) & (labels != draws.begins)
    # The prediction at a position is for the next position.
    flat[positions + 1] = torch.where(redrawn, written, labels)
    return flat.view_as(ids).cpu()
