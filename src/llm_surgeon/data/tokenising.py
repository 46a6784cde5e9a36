"""Tokens of a long text, read piece by piece: at once, a tokenizer takes more than a hundred bytes per character."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Characters of a piece, and by how many it reaches into each of its neighbours.
PIECE, CONTEXT = 2**18, 2**11
# Tokens on each side of a joint on which both pieces have to agree.
AGREED = 16

# Id of a token, and where it begins and ends in the text.
Token = tuple[int, int, int]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool, most: int | None = None) -> torch.Tensor:
    """Tokenise a text as one sequence.

    A long text is tokenised in pieces that overlap. Two pieces are joined in the middle of a run of tokens on which
    they agree, in ids and in places, as a tokenizer looks a few words around at most. Where they do not agree, the
    first is read on up to the end of the second. Tokenizers that do not tell the places of tokens read the whole text
    at once.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        special: Whether the tokenizer adds its tokens for the beginning and the end of a text.
        most: Number of tokens to take from the beginning, at most; None takes all.

    Returns:
        Token ids, int64, shape [tokens].
    """
    if len(text) <= PIECE or not tokenizer.is_fast:
        # verbose=False turns a warning off: the sequence is longer than the model's maximum on purpose.
        return _tensor(tokenizer(text, verbose=False, add_special_tokens=special).input_ids)[:most].clone()
    parts, taken = list[torch.Tensor](), 0
    for tokens in _pieces(tokenizer, text, special):
        parts.append(_tensor([token for token, _, _ in tokens]))
        taken += len(tokens)
        if most is not None and taken >= most:
            break
    return torch.cat(parts)[:most]


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> Iterator[list[Token]]:
    """Yield the tokens of each piece of a text, from one joint to the next."""

    def read(first: int, end: int) -> list[Token]:
        # Special tokens at the ends of a piece lie beyond its joints, but for those at the ends of the text.
        found = tokenizer(text[first:end], verbose=False, add_special_tokens=special, return_offsets_mapping=True)
        places = ((first + begin, first + end) for begin, end in found.offset_mapping)
        return [(token, *place) for token, place in zip(found.input_ids, places, strict=True)]

    first, there = 0, 0
    tokens = read(0, PIECE + CONTEXT)
    for start in range(PIECE, len(text), PIECE):
        end = start + PIECE + CONTEXT
        further = read(start - CONTEXT, end)
        joint = _joint(tokens, further, start)
        if joint is None:
            tokens = read(first, end)[there:]
            continue
        here, there = joint
        first = start - CONTEXT
        yield tokens[:here]
        tokens = further[there:]
    yield tokens


def _joint(before: list[Token], after: list[Token], place: int) -> tuple[int, int] | None:
    """Numbers of the token nearest to a place on which two pieces agree, with all around it; None if there is none."""
    # Several tokens of one character differ in their ids, or are not taken as joints.
    numbers = {token: number for number, token in enumerate(after) if token[1] <= place + CONTEXT}
    shared = [number for number, token in enumerate(before) if token in numbers]
    for here in sorted(shared, key=lambda number: abs(before[number][1] - place)):
        there = numbers[before[here]]
        if min(here, there) >= AGREED and min(len(before) - here, len(after) - there) >= AGREED:
            around = slice(here - AGREED, here + AGREED), slice(there - AGREED, there + AGREED)
            if before[around[0]] == after[around[1]]:
                return here, there
    return None


def _tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)
