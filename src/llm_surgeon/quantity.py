"""Numbers as people write them: 90M parameters, 300 MiB."""

from __future__ import annotations

import re

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
    """A count from a number with a suffix: K, M, G or B (billion), Ki, Mi, Gi, with or without B for bytes.

    Raises:
        ValueError: If it is none, or not positive.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmg]i?b?|b)?\s*", str(text).lower())
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if found is None or number <= 0:
        raise ValueError(f"{text!r} is no positive number with or without K, M, G, Ki, Mi or Gi")
    suffix = found[2] or ""
    # A lone B is a billion, as in 7B; after another letter it stands for bytes.
    suffix = suffix if suffix == "b" else suffix.removesuffix("b")
    return round(number * _FACTORS[suffix])
