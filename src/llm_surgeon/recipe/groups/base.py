"""Base of all groups of options, and the kinds of values that several groups have."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, field_validator

from llm_surgeon.recipe.quantity import closest, parse_quantity, shown
from llm_surgeon.recipe.sources import as_several, sources_of

# Largest values of options: of counts that each take time or memory, and of counts that texts and matrices limit.
FEW, MANY = 10_000, 10**9
# Largest seed. PyTorch's generators take twice as much, which leaves room for the seeds of shots.
MOST_SEED = 2**63 - 1


def _path_as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


Quantity = Annotated[int, BeforeValidator(parse_quantity)]


def _checked_sources(given: tuple[str, ...]) -> tuple[str, ...]:
    if not given:
        raise ValueError("has to have one entry at least")
    sources_of(given)
    return given


def _as_given(texts: tuple[str, ...]) -> str | list[str]:
    """One text as it is, several as a list."""
    return texts[0] if len(texts) == 1 else list(texts)


# One text or several, see ``sources.sources_of``.
TextSources = Annotated[
    tuple[Annotated[str, Field(min_length=1), BeforeValidator(_path_as_text)], ...],
    BeforeValidator(as_several),
    AfterValidator(_checked_sources),
    PlainSerializer(_as_given),
]


class Options(BaseModel):
    """Base of the groups: frozen and strict, without unknown options."""

    # Strict means that yes is no count, and 3.0 no whole number.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_numpy(cls, value: Any) -> Any:
        """Turn NumPy's whole numbers into Python's, as strict validation takes no others."""
        if isinstance(value, bool):
            return value
        return int(value) if isinstance(value, Integral) else value


def check_names(names: tuple[str, ...], known: Iterable[str]) -> tuple[str, ...]:
    """Check that names are rows of a table, each given once, and return them.

    Args:
        names: Names that a recipe gives.
        known: Names of the table's rows.

    Raises:
        ValueError: If a name is not in the table, or is given twice; in words that follow the name of an option.
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
