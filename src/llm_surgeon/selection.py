"""Which rows and columns go: one global threshold over all layers, with what a removal implies.

Pure functions of tensors. Everything is in the coordinates of the dense model; what earlier shots removed is False
in the keep masks and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Axis = Literal["rows", "columns"]
AXES: tuple[Axis, Axis] = ("rows", "columns")

# What killed a group: the number of one of its sides, or one of these.
ALIVE, DEAD_BEFORE = -1, -2


@dataclass(frozen=True)
class KeepMask:
    """Kept rows ``[R]`` and columns ``[C]`` of one matrix, True = kept. The bias column is not among them."""

    rows: Tensor
    columns: Tensor

    def axis(self, axis: Axis) -> Tensor:
        """The mask along one axis."""
        return self.rows if axis == "rows" else self.columns

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns that are stored."""
        return int(self.rows.sum()), int(self.columns.sum())

    @property
    def weights(self) -> int:
        """Weights left: kept rows times kept columns."""
        return int(self.rows.sum()) * int(self.columns.sum())

    def copy(self) -> KeepMask:
        """A mask that can be written without changing this one."""
        return KeepMask(self.rows.clone(), self.columns.clone())

    @classmethod
    def dense(cls, rows: int, columns: int) -> KeepMask:
        """Everything kept."""
        return cls(torch.ones(rows, dtype=torch.bool), torch.ones(columns, dtype=torch.bool))


@dataclass(frozen=True)
class StructureCosts:
    """Loss increase of removing each row ``[R]`` or column ``[C]`` of one matrix alone; zero where already removed."""

    rows: Tensor
    columns: Tensor

    def axis(self, axis: Axis) -> Tensor:
        """The costs along one axis."""
        return self.rows if axis == "rows" else self.columns


@dataclass(frozen=True)
class Side:
    """For each group of a coupling, some rows or columns of one matrix: ``index [groups, members]``."""

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
        kind: What a group is.
        sides: The sides, with equally many groups each.
        followers: What dies with a group without being able to kill it.
        candidate: Whether a group may be removed as a whole. The cost of a side is the sum of its members' costs,
            which is far too low for many correlated members (a whole head: perplexity 40.4 instead of 29.9 on
            SmolLM2-135M at 80 % in one shot), so large groups only die by implication.
    """

    kind: str
    sides: tuple[Side, ...]
    followers: tuple[Side, ...] = ()
    candidate: bool = True


@dataclass(frozen=True)
class Selection:
    """The outcome of one shot's threshold.

    Attributes:
        keep: What is left afterwards, per layer.
        chosen: Rows and columns removed for their own cost (True = removed): the update compensates for them.
        threshold: Largest score removed; every structure or group scored at most this is gone.
        structures_chosen: How many rows and columns were removed for their cost.
        structures_implied: How many died because a partner did; they cost nothing and are not compensated for.
        loss: Sum of the costs of the chosen structures, the predicted loss increase if they were independent.
    """

    keep: dict[str, KeepMask]
    chosen: dict[str, KeepMask]
    threshold: float
    structures_chosen: int
    structures_implied: int
    loss: float


@dataclass(frozen=True)
class Group:
    """The groups of a coupling with the costs of their sides.

    Attributes:
        coupling: What dies together.
        side_costs: ``[sides, groups]``, the sum of the costs of each side's living members.
        score: ``[groups]``, of killing each group by its cheapest side.
    """

    coupling: Coupling
    side_costs: Tensor
    score: Tensor


def count_weights(keep: Mapping[str, KeepMask]) -> int:
    """Weights left in all layers; rows and columns that overlap are counted once by construction."""
    return sum(mask.weights for mask in keep.values())


def close(keep: Mapping[str, KeepMask], groups: Sequence[Group], causes: Sequence[Tensor]) -> None:
    """Remove, in place, everything that is dead by implication, until nothing changes.

    Args:
        keep: Masks per layer, written in place.
        groups: The couplings with the costs of their sides.
        causes: Per coupling ``[groups]``, the side that killed each group; ``ALIVE`` where none did yet, written in
            place. If several sides are found dead at once, the cheapest is the cause.
    """
    changed = True
    while changed:
        changed = False
        for group, cause in zip(groups, causes, strict=True):
            sides = _dead_sides(keep, group.coupling)
            newly = sides.any(0) & (cause == ALIVE)
            if newly.any():
                cheapest = group.side_costs.masked_fill(~sides, float("inf")).argmin(0)
                _kill(keep, group.coupling, newly, cause, cheapest)
                changed = True


def select(
    keep: Mapping[str, KeepMask],
    costs: Mapping[str, StructureCosts],
    couplings: Sequence[Coupling],
    target_weights: int,
    per_weight: bool = True,
) -> Selection:
    """Find the largest threshold whose removal leaves at least ``target_weights``.

    Every kept row and column is a candidate, scored by its cost over the weights it frees; so is every group of a
    coupling, scored by the cheapest of its sides (the sum of that side's costs) over *all* that dies with it. What
    scores at most the threshold is removed together with everything that this implies, and the weights left are
    counted exactly. As more is removed at a higher threshold, bisection over the sorted scores finds the largest
    admissible one (paper, section 3.3, with implied structures counted at once).

    Args:
        keep: Current masks per layer.
        costs: Costs per layer, non-negative and finite.
        couplings: What dies together.
        target_weights: Weights that must be left.
        per_weight: Rank by cost per weight freed; False ranks by raw cost, as the paper does.

    Returns:
        The selection; it removes nothing if even the cheapest candidate frees too much.
    """
    scores = {name: single_scores(keep[name], costs[name], per_weight) for name in keep}
    groups = [score_groups(keep, costs, coupling, per_weight) for coupling in couplings]
    candidates = torch.cat(
        [score.axis(axis)[keep[name].axis(axis)] for name, score in scores.items() for axis in AXES]
        + [group.score for group in groups]
    )
    ladder = candidates[candidates.isfinite()].unique()
    low, high = -1, len(ladder) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if count_weights(_removed_at(float(ladder[middle]), keep, scores, groups)[0]) >= target_weights:
            low = middle
        else:
            high = middle - 1
    threshold = float(ladder[low]) if low >= 0 else float("-inf")
    after, causes = _removed_at(threshold, keep, scores, groups)
    return _explain(keep, after, costs, groups, causes, threshold)


def single_scores(keep: KeepMask, costs: StructureCosts, per_weight: bool) -> StructureCosts:
    """Scores of single rows and columns, in float64: the threshold has to tell a million candidates apart."""
    rows_free, columns_free = int(keep.columns.sum()), int(keep.rows.sum())
    return StructureCosts(
        _score(costs.rows.double(), torch.tensor(float(rows_free)), per_weight),
        _score(costs.columns.double(), torch.tensor(float(columns_free)), per_weight),
    )


def _score(cost: Tensor, freed: Tensor, per_weight: bool) -> Tensor:
    """Cost, or cost per weight freed; what frees nothing any more is free to go."""
    if not per_weight:
        return cost
    return torch.where(freed > 0, cost / freed.clamp(min=1), torch.zeros_like(cost))


def score_groups(
    keep: Mapping[str, KeepMask], costs: Mapping[str, StructureCosts], coupling: Coupling, per_weight: bool
) -> Group:
    """Score each group of a coupling by its cheapest side over all the weights that die with it."""
    freed = torch.zeros(coupling.sides[0].index.shape[0], dtype=torch.float64)
    for part in coupling.sides + coupling.followers:
        freed += _alive(keep, part).sum(1) * int(keep[part.layer].axis(_other(part.axis)).sum())
    side_costs = torch.stack(
        [
            (costs[side.layer].axis(side.axis).double()[side.index] * _alive(keep, side)).sum(1)
            for side in coupling.sides
        ]
    )
    score = _score(side_costs.amin(dim=0), freed, per_weight)
    excluded = _dead_sides(keep, coupling).any(0) if coupling.candidate else torch.ones_like(score, dtype=torch.bool)
    return Group(coupling, side_costs, score.masked_fill(excluded, float("inf")))


def _removed_at(
    threshold: float, keep: Mapping[str, KeepMask], scores: Mapping[str, StructureCosts], groups: Sequence[Group]
) -> tuple[dict[str, KeepMask], list[Tensor]]:
    """The masks once everything scored at most ``threshold``, and what this implies, is gone; and what killed whom."""
    after = {
        name: KeepMask(mask.rows & (scores[name].rows > threshold), mask.columns & (scores[name].columns > threshold))
        for name, mask in keep.items()
    }
    causes = []
    for group in groups:
        cause = torch.where(_dead_sides(keep, group.coupling).any(0), DEAD_BEFORE, ALIVE)
        _kill(after, group.coupling, group.score <= threshold, cause, group.side_costs.argmin(0))
        causes.append(cause)
    close(after, groups, causes)
    return after, causes


def _kill(
    keep: Mapping[str, KeepMask], coupling: Coupling, groups: Tensor, cause: Tensor, killing_side: Tensor
) -> None:
    """Remove the marked groups in place, and note the side that killed them."""
    cause[groups] = killing_side[groups]
    for part in coupling.sides + coupling.followers:
        _clear(keep, part, groups)


def _explain(
    before: Mapping[str, KeepMask],
    after: dict[str, KeepMask],
    costs: Mapping[str, StructureCosts],
    groups: Sequence[Group],
    causes: Sequence[Tensor],
    threshold: float,
) -> Selection:
    """Tell what was removed for its cost from what merely followed.

    Of a dead group only the killing side is chosen: compensating for two would compensate twice for the same loss.
    """
    chosen = {
        name: KeepMask(mask.rows & ~after[name].rows, mask.columns & ~after[name].columns)
        for name, mask in before.items()
    }
    for group, cause in zip(groups, causes, strict=True):
        for number, side in enumerate(group.coupling.sides):
            _clear(chosen, side, (cause >= 0) & (cause != number))
        for follower in group.coupling.followers:
            _clear(chosen, follower, cause >= 0)
    removed = sum(_count_structures(before[name]) - _count_structures(after[name]) for name in before)
    own = sum(_count_structures(mask) for mask in chosen.values())
    loss = sum(
        float(costs[name].axis(axis)[mask.axis(axis)].double().sum()) for name, mask in chosen.items() for axis in AXES
    )
    return Selection(after, chosen, threshold, own, removed - own, loss)


def _count_structures(mask: KeepMask) -> int:
    return int(mask.rows.sum()) + int(mask.columns.sum())


def _other(axis: Axis) -> Axis:
    return "columns" if axis == "rows" else "rows"


def _alive(keep: Mapping[str, KeepMask], side: Side) -> Tensor:
    """``[groups, members]``: which members are kept."""
    return keep[side.layer].axis(side.axis)[side.index]


def _dead_sides(keep: Mapping[str, KeepMask], coupling: Coupling) -> Tensor:
    """``[sides, groups]``: which sides have no living member."""
    return torch.stack([~_alive(keep, side).any(1) for side in coupling.sides])


def _clear(keep: Mapping[str, KeepMask], side: Side, groups: Tensor) -> None:
    """Clear the members of the marked groups, in place."""
    keep[side.layer].axis(side.axis)[side.index[groups].reshape(-1)] = False
