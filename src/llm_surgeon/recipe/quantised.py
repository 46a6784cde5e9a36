"""Types of quantised weights, and the widths that they need.

A quantised type stores the weights of a row in blocks of equal size, so that the columns of a matrix have to be a
multiple of it. llama.cpp gives other matrices another type, which is larger: see ``tensor_type_fallback`` in its
quantiser. Types and block sizes are those of ggml (``ggml-common.h``).
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from llm_surgeon.recipe.quantity import closest


@dataclass(frozen=True)
class QuantisedType:
    """One type of quantised weights.

    Attributes:
        block: Columns of a matrix have to be a multiple of this.
        fallback: Type that llama.cpp gives to other matrices.
    """

    block: int
    fallback: str


_SMALL, _LARGE = 32, 256
# Largest multiple of a width.
MOST = 10**9
QUANTISED: dict[str, QuantisedType] = {
    **{name: QuantisedType(_SMALL, "F16") for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")},
    "q2_k": QuantisedType(_LARGE, "Q4_0"),
    "q3_k": QuantisedType(_LARGE, "Q4_0"),
    "q4_k": QuantisedType(_LARGE, "Q5_0"),
    "q5_k": QuantisedType(_LARGE, "Q5_1"),
    "q6_k": QuantisedType(_LARGE, "Q8_0"),
    "iq4_xs": QuantisedType(_LARGE, "IQ4_NL"),
}


def quantised_type(name: str) -> str | None:
    """Name of the type in ``QUANTISED`` that a name in any case stands for, such as Q4_K_M; None if there is none.

    Mixtures of K-quants (``_S``, ``_M``, ``_L``) need the widths of their main type.
    """
    plain = name.lower()
    return next((known for known in (plain, plain.rsplit("_", 1)[0]) if known in QUANTISED), None)


def parse_multiple(value: object) -> object:
    """Parse the option ``round_to``: a whole number, also as text, or the name of a quantised type.

    Raises:
        ValueError: If it is neither, or out of range; in words that follow the name of an option.
    """
    with contextlib.suppress(ValueError):
        value = int(value) if isinstance(value, str) else value
    if isinstance(value, int) and not isinstance(value, bool) and not 1 <= value <= MOST:
        raise ValueError(f"has to be from 1 to {MOST:,}")
    if not isinstance(value, str):
        return value
    if quantised_type(value) is None:
        meant = closest(value.lower(), QUANTISED)
        hint = f" (did you mean {meant}?)" if meant else ""
        raise ValueError(
            f"is neither a whole number nor a quantised type{hint}; known are {', '.join(QUANTISED)}, and mixtures "
            "such as q4_k_m"
        )
    return value
