"""Scores of SentencePiece-like tokens: llama.cpp merges by the score of the token that a merge makes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.export.gguf.pre_tokenizers import REMEDY, flattened

SPACE = "▁"
# Score of a token that no merge makes: below that of every merge.
_NEVER = -1e9


@dataclass(frozen=True)
class Spacing:
    """Treatment of a text's beginning.

    Attributes:
        prefix: Whether a space is put before it.
        differences: Texts that llama.cpp treats otherwise all the same.
    """

    prefix: bool
    differences: tuple[str, ...] = ()


_LEADING = "A text that begins with a space gets one more in llama.cpp."
_AFTER_SPECIAL = "The text after a special token gets a space before it in llama.cpp."


def spacing_of(backend: Mapping[str, Any]) -> Spacing:
    """How a tokenizer with byte fallback begins a text.

    Args:
        backend: The tokenizer's backend, as in its ``tokenizer.json``.

    Raises:
        UnsupportedModelError: If the tokenizer does more to a text than llama.cpp can.
    """
    normalizers = [_named(step) for step in flattened(backend["normalizer"])]
    splits = [_named(step) for step in flattened(backend["pre_tokenizer"])]
    replaced = ("Replace", {"String": " "}, SPACE)
    match normalizers:
        case [("Prepend", "▁"), step] if step == replaced and not splits:
            return Spacing(True)
        # No space is left for this split to find.
        case [step] if step == replaced and splits in ([], [("Split", {"String": " "}, "MergedWithPrevious", False)]):
            return Spacing(False)
        case [] if splits == [("Metaspace", SPACE, "never", False)]:
            return Spacing(False)
        case [] if splits == [("Metaspace", SPACE, "always", False)]:
            return Spacing(True, (_LEADING,))
        case [] if splits == [("Metaspace", SPACE, "first", False)]:
            return Spacing(True, (_LEADING, _AFTER_SPECIAL))
    raise UnsupportedModelError(
        f"llama.cpp cannot prepare a text as this tokenizer does ({normalizers or 'no normalizer'}; "
        f"{splits or 'no splits'}).",
        REMEDY,
    )


def _named(step: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(step.values())


def piece_scores(tokens: Sequence[str], merged: Iterable[int], merges: Sequence[tuple[str, str]]) -> list[float]:
    """Scores with which llama.cpp merges in the order of a tokenizer's merges.

    llama.cpp joins any two neighbours that make a token, in the order of that token's score, and of equal ones the
    leftmost first. The tokenizer joins only those of its list, in the order of the list. Both are the same if the list
    has every pair that makes a token, and all pairs of one token beside each other, as in lists that were made from
    SentencePiece's scores. Runs of one character, mostly spaces, had equal scores there: they may be mixed, as from
    single characters a run grows from the left in either order.

    Args:
        tokens: All tokens.
        merged: Ids of the tokens that merges may make.
        merges: The pairs in their order.

    Raises:
        UnsupportedModelError: If scores cannot say what the merges do.
    """
    made = [left + right for left, right in merges]
    first, last, pairs = dict[str, int](), dict[str, int](), dict[str, set[int]]()
    for rank, ((left, _), token) in enumerate(zip(merges, made, strict=True)):
        first.setdefault(token, rank)
        last[token] = rank
        pairs.setdefault(token, set()).add(len(left))
    known = set(tokens)
    for number in merged:
        if _possible(tokens[number], known) != pairs.get(tokens[number], set()):
            raise _not_scored(f"its merges do not have every pair of tokens that makes {tokens[number]!r}")
    mixed = [token for token in first if last[token] - first[token] >= len(pairs[token])]
    if mixed:
        start, end = min(first[token] for token in mixed), max(last[token] for token in mixed)
        run = set(made[start : end + 1])
        if len({character for token in run for character in token}) > 1:
            raise _not_scored(f"its merges into {mixed[0]!r} are not beside each other")
        first |= dict.fromkeys(run, start)
    return [-float(first[token]) if token in first else _NEVER for token in tokens]


def _possible(token: str, known: Set[str]) -> set[int]:
    """Where a token can be cut into two neighbours: tokens or single characters."""
    length = len(token)
    return {
        cut
        for cut in range(1, length)
        if (cut == 1 or token[:cut] in known) and (cut == length - 1 or token[cut:] in known)
    }


def _not_scored(cause: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.cpp merges by a score for each token, and this tokenizer cannot be put so: {cause}.", REMEDY
    )
