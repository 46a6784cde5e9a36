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


class _NoJointError(Exception):
    """Two pieces of a text do not agree on their tokens."""


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool, most: int | None = None) -> torch.Tensor:
    """Tokenise a text as one sequence.

    A long text is tokenised in pieces that overlap. Two pieces are joined in the middle of a run of tokens on which
    they agree, in ids and in places, as a tokenizer looks a few words around at most. Where they do not agree, and for
    tokenizers that do not tell the places of tokens, the whole text is tokenised at once.

    Args:
        tokenizer: The tokenizer.
        text: The text.
        special: Whether the tokenizer adds its tokens for the beginning and the end of a text.
        most: Number of tokens to take from the beginning, at most; None takes all.

    Returns:
        Token ids, int64, shape [tokens].
    """
    if len(text) > PIECE and tokenizer.is_fast:
        try:
            return _in_pieces(tokenizer, text, special, most)
        except _NoJointError:
            pass
    # verbose=False turns a warning off: the sequence is longer than the model's maximum on purpose.
    return _tensor(tokenizer(text, verbose=False, add_special_tokens=special).input_ids)[:most].clone()


def _in_pieces(tokenizer: PreTrainedTokenizerBase, text: str, special: bool, most: int | None) -> torch.Tensor:
    """Token ids of a long text, see ``token_ids``.

    Raises:
        _NoJointError: If two pieces do not agree on their tokens.
    """
    parts, taken = list[torch.Tensor](), 0
    for tokens in _joined(tokenizer, text, special):
        parts.append(_tensor([token for token, _, _ in tokens]))
        taken += len(tokens)
        if most is not None and taken >= most:
            break
    return torch.cat(parts)[:most]


def _joined(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> Iterator[list[Token]]:
    """Yield the tokens of each piece of a text, from one joint to the next.

    Raises:
        _NoJointError: If two pieces do not agree on their tokens.
    """
    tokens: list[Token] = []
    for start in range(0, len(text), PIECE):
        first = max(0, start - CONTEXT)
        piece = text[first : start + PIECE + CONTEXT]
        # Special tokens at the ends of a piece lie beyond its joints, but for those at the ends of the text.
        read = tokenizer(piece, verbose=False, add_special_tokens=special, return_offsets_mapping=True)
        places = ((first + begin, first + end) for begin, end in read.offset_mapping)
        further = [(token, *place) for token, place in zip(read.input_ids, places, strict=True)]
        if start:
            here, there = _joint(tokens, further, start)
            yield tokens[:here]
            further = further[there:]
        tokens = further
    yield tokens


def _joint(before: list[Token], after: list[Token], place: int) -> tuple[int, int]:
    """Numbers of one token in two pieces on which they agree, with all around it, and which is nearest to a place.

    Raises:
        _NoJointError: If there is none.
    """
    # Several tokens of one character differ in their ids, or are not taken as joints.
    numbers = {token: number for number, token in enumerate(after) if token[1] <= place + CONTEXT}
    shared = [number for number, token in enumerate(before) if token in numbers]
    for here in sorted(shared, key=lambda number: abs(before[number][1] - place)):
        there = numbers[before[here]]
        if min(here, there) >= AGREED and min(len(before) - here, len(after) - there) >= AGREED:
            around = slice(here - AGREED, here + AGREED), slice(there - AGREED, there + AGREED)
            if before[around[0]] == after[around[1]]:
                return here, there
    raise _NoJointError


def _tensor(ids: list[int]) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64)
