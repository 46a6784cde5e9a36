"""The base of every group of options, and the kinds of values that several groups have."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, field_validator

from llm_surgeon.recipe.quantity import closest, parse_quantity, shown

# Most of what takes time or memory of its own, and of what texts and matrices limit: nobody means more.
FEW, MANY = 10_000, 10**9
# PyTorch's generators take twice as much, which leaves room for the shots' own seeds.
MOST_SEED = 2**63 - 1


def _path_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Quantity = Annotated[int, BeforeValidator(parse_quantity)]
TextSource = Annotated[str, BeforeValidator(_path_as_text)]


class Options(BaseModel):
    """Base of the groups: strict, frozen, and without any option that it does not know."""

    # Strict: yes is no count, and 3.0 no whole number.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_numpy(cls, value: Any) -> Any:
        """NumPy's whole numbers as Python's own, which is what strict validation takes."""
        if isinstance(value, bool):
            return value
        return int(value) if isinstance(value, Integral) else value


def check_names(names: tuple[str, ...], known: Iterable[str]) -> tuple[str, ...]:
    """Names of rows of a table, once each.

    Args:
        names: The names that a recipe gives.
        known: The names of the table.

    Raises:
        ValueError: If one is not in the table, or there twice; in words that go behind the name of an option.
    """
    known = list(known)
    for position, name in enumerate(names):
        if name not in known:
            meant = closest(name, known)
            hint = f" (did you mean {meant}?)" if meant else ""
            raise ValueError(f"has {shown(name)}, which is not known{hint}; known are {', '.join(known) or 'none'}")
        if name in names[:position]:
            raise ValueError(f"has {shown(name)} twice")
    return names
