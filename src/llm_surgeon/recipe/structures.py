"""The table of structures that shrink matrices, and the rules that follow from its rows.

The row of a structure has everything that the recipe has to know of it, so a structure of your own is one more row.
Structures that are joined by + obey the rules of each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DEFAULT, UNSTRUCTURED = "rows-columns", "unstructured"
# Multiple of the number of neurons; larger multiples are no faster, see benchmarks/results/widths.md.
ROUND_TO = 32
# Least width of coupled structures, so that no layer loses everything unless a recipe asks for it.
_MIN_WIDTH = 0.05


@dataclass(frozen=True)
class StructureRow:
    """One row of the table of structures that shrink matrices.

    Attributes:
        words: Explanation behind the name in the help, in brackets there; may be empty.
        noun: Plural of the removed units, for sentences; empty takes the name of the structure.
        coupled: Whether all matrices of a block that share a unit of the structure lose it together, so that the block
            keeps one width.
        uniform: Whether all blocks can be given the same width.
        uniform_by_default: Whether they are, unless a recipe says otherwise.
        whole: Whether ``uniform`` takes whole parts of a block, which leaves nothing for another structure to remove.
        multiple: Default multiple of the number of units left in each block; None if the number cannot be rounded.
        min_width: Default of the least share of the dense width that each block keeps.
        joint: Whether the structure is removed by joint costs of many rows or columns, which not every curvature has.
        large: Whether groups have so many members that the sum of the members' costs says little of the group's cost.
    """

    words: str = ""
    noun: str = ""
    coupled: bool = True
    uniform: bool = False
    uniform_by_default: bool = False
    whole: bool = False
    multiple: int | None = None
    min_width: float = 0.0
    joint: bool = False
    large: bool = False


STRUCTURES: dict[str, StructureRow] = {
    "rows-columns": StructureRow("of each matrix", "rows and columns", coupled=False),
    "neurons": StructureRow(uniform=True, multiple=ROUND_TO, min_width=_MIN_WIDTH),
    "heads": StructureRow(uniform=True, min_width=_MIN_WIDTH, joint=True, large=True),
    "values": StructureRow("single value dimensions", "value dimensions", min_width=_MIN_WIDTH, joint=True),
    "experts": StructureRow(
        "whole experts of a mixture; equally many in each block unless --no-uniform",
        uniform=True,
        uniform_by_default=True,
        min_width=_MIN_WIDTH,
        joint=True,
        large=True,
    ),
    "blocks": StructureRow(
        "attention or feed-forward parts; costly",
        "attention and feed-forward parts",
        uniform=True,
        whole=True,
        joint=True,
        large=True,
    ),
}


def parts_of(structure: Any) -> tuple[str, ...]:
    """Names of the structures that are joined by + in a structure that shrinks matrices; none for other structures."""
    parts = tuple(structure.split("+")) if isinstance(structure, str) else ()
    return parts if parts and parts[0] in STRUCTURES else ()


def multiple_of(parts: Iterable[str]) -> int | None:
    """Default multiple of the number of units left in each block; None if the number cannot be rounded."""
    rows = [STRUCTURES[part] for part in parts]
    multiples = [row.multiple for row in rows if row.multiple is not None]
    return max(multiples) if multiples and all(row.coupled for row in rows) else None


def min_width_of(parts: Iterable[str]) -> float:
    """Default of the least share of its dense width that each block keeps."""
    return min((STRUCTURES[part].min_width for part in parts), default=0.0)


def uniform_by_default(parts: Iterable[str]) -> bool:
    """Whether all blocks are given the same widths unless a recipe says otherwise."""
    rows = [STRUCTURES.get(part, StructureRow()) for part in parts]
    return any(row.uniform_by_default for row in rows) and all(row.uniform for row in rows)


def uniform_structures() -> list[str]:
    """Names of the structures that can have the same width in every block."""
    return [name for name, row in STRUCTURES.items() if row.uniform]


def explained() -> str:
    """Names of the structures that shrink matrices, each with its explanation, for the help."""
    return ", ".join(f"{name} ({row.words})" if row.words else name for name, row in STRUCTURES.items())
