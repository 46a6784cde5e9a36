"""Selection of rows and columns: one global threshold over all layers, with everything that a removal implies.

Pure functions of tensors. Everything is in the coordinates of the dense model; what earlier shots removed is False
in the keep masks and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_surgeon.mathematics.candidates import Group, Line, line_up, single_scores
from llm_surgeon.mathematics.keep_masks import (
    AXES,
    Coupling,
    KeepMask,
    StructureCosts,
    count_structures,
    count_weights,
    dead_sides,
    write_members,
)

# The search goes on behind candidates that do not fit this many times at most.
_PASSED_OVER = 50
# The cause of a group's death is the number of the side that killed it, or one of these.
ALIVE, DEAD_BEFORE = -1, -2


@dataclass(frozen=True)
class Selection:
    """The outcome of one shot's threshold.

    Attributes:
        keep: Masks after the shot, per layer.
        chosen: Rows and columns removed for their own cost or for that of their group (True = removed): the update
            compensates for them.
        threshold: Largest score removed; everything that scored less is gone. Of candidates that score just this, the
            first in a fixed order may be gone and the others left.
        structures_chosen: Number of rows and columns removed for their cost.
        structures_implied: Number of rows and columns that died because a partner did. They cost nothing and are not
            compensated for.
        loss: Sum of the costs of what was chosen, the predicted loss increase if the choices were independent.
        groups: Couplings with their scores, as the selection was given them.
        next_weights: Weights that the next candidate would have freed, too many for the target; 0 if there is none.
    """

    keep: dict[str, KeepMask]
    chosen: dict[str, KeepMask]
    threshold: float
    structures_chosen: int
    structures_implied: int
    loss: float
    groups: Sequence[Group]
    next_weights: int


def close(
    keep: Mapping[str, KeepMask],
    groups: Sequence[Group],
    causes: Sequence[Tensor],
    chosen: Mapping[str, KeepMask] | None = None,
) -> None:
    """Remove, in place, everything that is dead by implication, until nothing changes.

    Args:
        keep: Masks per layer, written in place.
        groups: The couplings with the costs of their sides.
        causes: Per coupling ``[groups]``, the side that killed each group; ``ALIVE`` where none did yet, written in
            place. If several sides are found dead at once, the cause is the cheapest of those whose members went for
            their own cost.
        chosen: Rows and columns that went for their own cost (True = removed); None if the causes do not matter.
    """
    changed = True
    while changed:
        changed = False
        for group, cause in zip(groups, causes, strict=True):
            sides = dead_sides(keep, group.coupling)
            newly = sides.any(0) & (cause == ALIVE)
            if newly.any():
                rank = group.side_costs.masked_fill(~sides, float("inf"))
                if chosen is not None:
                    own = _chosen_sides(chosen, group.coupling) & sides
                    rank = torch.where(own | ~(own.any(0)), rank, float("inf"))
                _kill(keep, group.coupling, newly, cause, rank.argmin(0))
                changed = True


def select(
    keep: Mapping[str, KeepMask],
    costs: Mapping[str, StructureCosts] | None,
    groups: Sequence[Group],
    target_weights: int,
    per_weight: bool = True,
    fill: bool = False,
    some: bool = False,
) -> Selection:
    """Find the largest threshold whose removal leaves at least ``target_weights``.

    Every kept row and column is a candidate, scored by its cost over the weights it frees, unless only whole groups
    are; so is every group whose score is finite. Candidates stand in line by their scores, equals in a fixed order:
    groups first, then layer by layer. The first so many are removed together with everything that this implies, and
    the weights left are counted exactly. As more is removed farther down the line, bisection finds the last position
    that is admissible (paper, section 3.3, with implied structures counted at once).

    Beyond the first that does not fit, those of equal score still go as far as they fit.

    Args:
        keep: Current masks per layer.
        costs: Costs of single rows and columns per layer, non-negative and finite; None if they are no candidates.
        groups: Couplings with their scores.
        target_weights: Number of weights that must be left.
        per_weight: Rank single rows and columns by cost per weight freed; False ranks by raw cost, as the paper does.
        fill: Whether every later candidate that still fits goes too. This is for few, large candidates, the first of
            which to exceed the target may leave much to remove.
        some: Whether to do so at least for a line of which not even the first candidate fits.

    Returns:
        The selection; it removes nothing if every candidate frees too much.
    """
    singles = {} if costs is None else {name: single_scores(keep[name], costs[name], per_weight) for name in keep}
    line = line_up(keep, singles, groups)

    def left(going: Tensor) -> int:
        return count_weights(_removed(going, line, keep, groups).keep)

    def fits(going: Tensor) -> bool:
        return left(going) >= target_weights

    rest = torch.arange(len(line.scores))
    going = torch.zeros(len(line.scores) + 1, dtype=torch.bool)
    first = _how_many_fit(going, rest, fits)
    going[:first] = True
    rest = rest[first:]
    if not (fill or (some and not first)):
        rest = rest[line.scores[rest] == line.scores[rest[:1]]]
    for _ in range(_PASSED_OVER):
        if len(rest) < 2:
            break
        # The first of the rest does not fit, nor does a candidate that alone frees more than there is room for.
        rest = line.ready(rest[1:][line.freed[rest[1:]] <= left(going) - target_weights], going)
        more = _how_many_fit(going, rest, fits)
        going[rest[:more]] = True
        rest = rest[more:]
    removed = _removed(going, line, keep, groups)
    beyond = (~going[:-1]).nonzero().flatten()[:1]
    next_weights = count_weights(removed.keep) - left(going.index_fill(0, beyond, True)) if len(beyond) else 0
    threshold = float(line.scores[first - 1]) if first else float("-inf")
    return _explain(keep, removed, costs, groups, threshold, next_weights)


def _how_many_fit(going: Tensor, positions: Tensor, fits: Callable[[Tensor], bool]) -> int:
    """Number of the next candidates that can go besides those that go already; bisection, as more only removes more.

    Args:
        going: bool ``[candidates + 1]``, candidates that go already.
        positions: Positions in line of the next candidates, in order.
        fits: Whether so much may go.
    """
    low, high = 0, len(positions)
    # A search for the smallest model takes all.
    if high and fits(going.index_fill(0, positions, True)):
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if fits(going.index_fill(0, positions[:middle], True)):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class _Removed:
    """Masks after a removal, and how each group died.

    Attributes:
        keep: Rows and columns that are left (True = kept), per layer.
        chosen: Rows and columns that went for their own cost (True = removed), per layer.
        marked: Groups that went for their own score, bool ``[groups]`` per coupling.
        causes: Side that killed each group, ``[groups]`` per coupling; ``ALIVE`` or ``DEAD_BEFORE`` where none did.
    """

    keep: dict[str, KeepMask]
    chosen: dict[str, KeepMask]
    marked: list[Tensor]
    causes: list[Tensor]


def _removed(going: Tensor, line: Line, keep: Mapping[str, KeepMask], groups: Sequence[Group]) -> _Removed:
    """Remove some candidates, and everything that this implies.

    Args:
        going: bool ``[candidates + 1]``, positions of the line that go; the last stands for all that is no candidate.
        line: All candidates.
        keep: Masks before the removal.
        groups: Couplings with their scores.
    """
    after, chosen = {}, {}
    for name, mask in keep.items():
        if name in line.singles:
            rows, columns = (going[line.singles[name].axis(axis)] for axis in AXES)
        else:
            rows, columns = torch.zeros_like(mask.rows), torch.zeros_like(mask.columns)
        after[name], chosen[name] = KeepMask(mask.rows & ~rows, mask.columns & ~columns), KeepMask(rows, columns)
    everything, causes = [], []
    for group, positions in zip(groups, line.groups, strict=True):
        cause = torch.where(dead_sides(keep, group.coupling).any(0), DEAD_BEFORE, ALIVE)
        marked, killing = going[positions], group.side_costs.argmin(0)
        _kill(after, group.coupling, marked, cause, killing)
        for number, side in enumerate(group.coupling.sides):
            write_members(chosen, side, marked & (killing == number), True)
        everything.append(marked)
        causes.append(cause)
    close(after, groups, causes, chosen)
    return _Removed(after, chosen, everything, causes)


def _kill(
    keep: Mapping[str, KeepMask], coupling: Coupling, groups: Tensor, cause: Tensor, killing_side: Tensor
) -> None:
    """Remove the marked groups in place, and note the side that killed them."""
    cause[groups] = killing_side[groups]
    for part in coupling.sides + coupling.followers:
        write_members(keep, part, groups, False)


def _explain(
    before: Mapping[str, KeepMask],
    removed: _Removed,
    costs: Mapping[str, StructureCosts] | None,
    groups: Sequence[Group],
    threshold: float,
    next_weights: int,
) -> Selection:
    """Tell rows and columns that were removed for their cost from those that merely followed.

    Of a dead group only the killing side is chosen: compensating for two would compensate twice for the same loss.
    """
    after = removed.keep
    chosen = {
        name: KeepMask(mask.rows & removed.chosen[name].rows, mask.columns & removed.chosen[name].columns)
        for name, mask in before.items()
    }
    for group, cause in zip(groups, removed.causes, strict=True):
        for number, side in enumerate(group.coupling.sides):
            write_members(chosen, side, (cause >= 0) & (cause != number), False)
        for follower in group.coupling.followers:
            write_members(chosen, follower, cause >= 0, False)
    count = sum(count_structures(before[name]) - count_structures(after[name]) for name in before)
    own = sum(count_structures(mask) for mask in chosen.values())
    if costs is None:
        loss = sum(
            float(group.side_costs.amin(0)[marked].sum()) for group, marked in zip(groups, removed.marked, strict=True)
        )
    else:
        loss = sum(
            float(costs[name].axis(axis)[mask.axis(axis)].double().sum())
            for name, mask in chosen.items()
            for axis in AXES
        )
    return Selection(after, chosen, threshold, own, count - own, loss, groups, next_weights)


def _chosen_sides(chosen: Mapping[str, KeepMask], coupling: Coupling) -> Tensor:
    """Sides with members that went for their own cost, bool ``[sides, groups]``."""
    return torch.stack([chosen[side.layer].axis(side.axis)[side.index].any(1) for side in coupling.sides])
