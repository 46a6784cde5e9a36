"""Keep masks over the rows and columns of matrices, and the couplings of rows and columns that die together.

Pure data and functions of tensors. Everything is in the coordinates of the dense model. A row or column that an
earlier shot removed is False in its keep mask. This module knows no models: a layer is a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Axis = Literal["rows", "columns"]
AXES: tuple[Axis, Axis] = ("rows", "columns")


@dataclass(frozen=True)
class KeepMask:
    """Kept rows ``[R]`` and columns ``[C]`` of one matrix, True = kept. The bias column is not among them."""

    rows: Tensor
    columns: Tensor

    def axis(self, axis: Axis) -> Tensor:
        """The mask along one axis, ``[R]`` or ``[C]``."""
        return self.rows if axis == "rows" else self.columns

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of kept rows and kept columns: the shape in which the matrix is stored."""
        return int(self.rows.sum()), int(self.columns.sum())

    @property
    def weights(self) -> int:
        """Number of weights left: kept rows times kept columns."""
        return int(self.rows.sum()) * int(self.columns.sum())

    def copy(self) -> KeepMask:
        """A mask that can be written without changing this one."""
        return KeepMask(self.rows.clone(), self.columns.clone())

    @classmethod
    def dense(cls, rows: int, columns: int) -> KeepMask:
        """The mask of a dense matrix, which keeps all rows and columns."""
        return cls(torch.ones(rows, dtype=torch.bool), torch.ones(columns, dtype=torch.bool))


@dataclass(frozen=True)
class StructureCosts:
    """Loss increase of removing each row ``[R]`` or column ``[C]`` of one matrix alone; zero where already removed."""

    rows: Tensor
    columns: Tensor

    def axis(self, axis: Axis) -> Tensor:
        """The costs along one axis, ``[R]`` or ``[C]``."""
        return self.rows if axis == "rows" else self.columns


@dataclass(frozen=True)
class Side:
    """Rows or columns of one matrix for each group of a coupling: ``index [groups, members]``."""

    layer: str
    axis: Axis
    index: Tensor


@dataclass(frozen=True)
class Coupling:
    """Groups of structures that live and die together.

    Once all members of *one* side of a group are dead, the group's other sides and its ``followers`` have no effect
    on the network any more. Followers do not kill the group in turn.

    Example: neuron j of a gated MLP has the sides row j of ``gate``, row j of ``up`` and column j of ``down``.

    Attributes:
        kind: What a group is, in a word.
        sides: The sides, with equally many groups each.
        followers: Rows and columns that die with a group without being able to kill it.
        pools: ``[groups]``, numbers of pools that all have to keep equally many of their groups. None is one pool.
        structure: Structure of a recipe that removes such groups; empty if none does, and they only follow.
    """

    kind: str
    sides: tuple[Side, ...]
    followers: tuple[Side, ...] = ()
    pools: Tensor | None = None
    structure: str = ""


def count_weights(keep: Mapping[str, KeepMask]) -> int:
    """Number of weights left in all layers. A weight in both a removed row and a removed column counts once."""
    return sum(mask.weights for mask in keep.values())


def count_structures(mask: KeepMask) -> int:
    """Number of True rows and columns of a mask together."""
    return int(mask.rows.sum()) + int(mask.columns.sum())


def other_axis(axis: Axis) -> Axis:
    """The axis across the given one."""
    return "columns" if axis == "rows" else "rows"


def living_members(keep: Mapping[str, KeepMask], side: Side) -> Tensor:
    """Members of a side that are kept, bool ``[groups, members]``."""
    return keep[side.layer].axis(side.axis)[side.index]


def dead_sides(keep: Mapping[str, KeepMask], coupling: Coupling) -> Tensor:
    """Sides without a living member, bool ``[sides, groups]``."""
    return torch.stack([~living_members(keep, side).any(1) for side in coupling.sides])


def write_members(masks: Mapping[str, KeepMask], side: Side, groups: Tensor, value: bool) -> None:
    """Set the members of the marked groups of a side to a value, in place.

    Args:
        masks: Masks per layer, written in place.
        side: The side whose members are set.
        groups: bool ``[groups]``, True = marked.
        value: The value to set.
    """
    masks[side.layer].axis(side.axis)[side.index[groups].reshape(-1)] = value
