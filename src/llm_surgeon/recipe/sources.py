"""Sources of a text in a recipe: one text, or several with the share that each has."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from llm_surgeon.recipe.quantity import shown

# A share behind the last colon of a source. A sign is read too, so that it can be refused.
_SHARE = re.compile(r"(?P<text>.+):\s*(?P<share>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?\s*%?)\s*")
NONE = "none"


@dataclass(frozen=True)
class Source:
    """A text and its share of all that is read.

    Attributes:
        text: The text, as ``data.corpora.load_corpus`` takes it.
        share: Share of the sequences or windows, in (0, 1].
    """

    text: str
    share: float


def as_several(given: Any) -> tuple[Any, ...]:
    """One text as a tuple, lists as tuples; nothing as an empty one."""
    if isinstance(given, list | tuple):
        return tuple(given)
    return () if given is None else (given,)


def sources_of(given: tuple[str, ...]) -> tuple[Source, ...]:
    """Sources that a recipe names.

    Args:
        given: One text; or several, each as ``TEXT:SHARE``, or all without shares, which are then equal. Shares are in
            proportion: 0.7 and 0.3 are the same as 7 and 3. The name of one text alone is never taken apart.

    Raises:
        ValueError: If a share is not positive, only some texts have one, or a text comes twice; in words that follow
            the name of an option.
    """
    if len(given) == 1:
        return (Source(given[0], 1.0),)
    found = [_SHARE.fullmatch(text) for text in given]
    names = [text if share is None else share["text"] for text, share in zip(given, found, strict=True)]
    for number, name in enumerate(names):
        if name == NONE:
            raise ValueError(f"has {NONE} beside other texts")
        if name in names[:number]:
            share = found[number]
            read = f", as {shown(share[0])} is read as a text and its share" if share else ""
            raise ValueError(f"has {shown(name)} twice{read}")
    shares = [share["share"] for share in found if share is not None]
    if not shares:
        return tuple(Source(name, 1 / len(names)) for name in names)
    if len(shares) < len(given):
        without = next(text for text, share in zip(given, found, strict=True) if share is None)
        raise ValueError(f"has {shown(without)} without a share beside texts with one: write TEXT:SHARE for each")
    parts = [float(share.rstrip("% ")) for share in shares]
    wrong = next((share for share, part in zip(shares, parts, strict=True) if not 0 < part < math.inf), None)
    if wrong is not None:
        raise ValueError(f"has the share {wrong}: shares are positive numbers")
    return tuple(Source(name, part / sum(parts)) for name, part in zip(names, parts, strict=True))


def allotted(sources: tuple[Source, ...], total: int) -> list[int]:
    """Whole numbers for each source that add up to a total, as near to the shares as can be.

    The largest remainders are rounded up. A source may get none where the total is small.
    """
    exact = [Fraction(source.share) * total / sum(Fraction(other.share) for other in sources) for source in sources]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(sources)), key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: total - sum(counts)]:
        counts[number] += 1
    return counts
