"""Numbers as people write them (90M parameters, 300 MiB), and values as messages show them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from difflib import get_close_matches

# Largest quantity: no model and no memory has more, and it has to fit into 64 bits.
MOST = 10**18
# Largest number of characters of a value in a message.
LONGEST = 80
_FACTORS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "b": 10**9,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
}


def parse_quantity(text: str | int | float) -> int:
    """Parse a count with a suffix: K, M, G or B (billion), Ki, Mi, Gi, with or without B for bytes.

    Raises:
        ValueError: If the text is no number, not positive, or larger than ``MOST``.
    """
    number = _number(text)
    if number is None or number < 0.5:
        raise ValueError("is no positive number with or without K, M, G, Ki, Mi or Gi")
    if number > MOST:
        raise ValueError(f"is more than 10^{len(str(MOST)) - 1}")
    return max(1, round(number))


def _number(text: str | int | float) -> Decimal | int | None:
    """The exact number that is written; None if the text is no number."""
    # Whole numbers stay as they are, as Python refuses to write out thousands of digits; True is no number.
    if isinstance(text, int):
        return None if isinstance(text, bool) else text
    found = re.fullmatch(r"\s*([0-9.]+(?:e\+?[0-9]{1,4})?)\s*([kmg]i?b?|b)?\s*", str(text).lower())
    if found is None:
        return None
    suffix = found[2] or ""
    # A lone B is a billion, as in 7B; after another letter it stands for bytes.
    suffix = suffix if suffix == "b" else suffix.removesuffix("b")
    try:
        return Decimal(found[1]) * _FACTORS[suffix]
    except InvalidOperation:
        return None


def shown(value: object) -> str:
    """Write a value for a message: on one line, and cut in the middle if it is long."""
    text = _SHORT.repr(value).replace("\n", " ")
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - len("...")) // 2
    return f"{text[:half]}...{text[-half:]}"


def closest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that a word may be a misspelling of; None if no choice is similar."""
    found = get_close_matches(word[:LONGEST].lower(), list(choices), n=1)
    return found[0] if found else None


class _Short(reprlib.Repr):
    """Writer of values that stops at what fits: a few kilobytes of YAML can stand for billions of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 12
        self.maxstring = self.maxother = self.maxlong = LONGEST

    def repr_int(self, x: int, level: int) -> str:
        """Write a number, or only its length, as Python refuses to write out thousands of digits."""
        digits = int(x.bit_length() * 0.30103) + 1
        return repr(x) if digits <= LONGEST else f"a number of about {digits:,} digits"


_SHORT = _Short()


def duration(seconds: float) -> str:
    """Write seconds in a fitting unit: ``42 s``, ``12 min``, ``3.4 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
