"""Selection of single weights: one global threshold over all layers, for any weight or for N of every M neighbours.

Pure functions of tensors. What earlier shots removed is False in the masks, costs nothing and never comes back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_surgeon.mathematics.nm_pattern import Pattern

# A non-negative float32 orders like its bit pattern; the threshold is found by the upper half of it, then the lower.
_HALF = 16


@dataclass(frozen=True)
class ElementMask:
    """Kept weights ``[R, C]`` of one matrix, True = kept. The bias column is not among them."""

    elements: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of rows and columns of the matrix."""
        rows, columns = self.elements.shape
        return rows, columns

    @property
    def weights(self) -> int:
        """Number of weights left."""
        return int(self.elements.sum())


@dataclass(frozen=True)
class ElementSelection:
    """The outcome of one shot's threshold.

    Attributes:
        keep: Masks after the shot, per layer.
        threshold: Every candidate scored at most this is gone; of those that score next, and equally, the first may be.
        structures_chosen: Number of weights removed in this shot.
        loss: Sum of their costs, the predicted loss increase if they were independent.
        next_weights: Weights that the next candidate would have freed, too many for the target; 0 if there is none.
        structures_implied: Always 0: a weight has no partner that would die with it.
    """

    keep: dict[str, ElementMask]
    threshold: float
    structures_chosen: int
    loss: float
    next_weights: int
    structures_implied: int = 0


def candidate_scores(keep: ElementMask, costs: Tensor, pattern: Pattern | None) -> Tensor:
    """Scores of all candidates: each kept weight, or each group of the pattern that is still whole.

    A group's score is the sum of the costs of its cheapest weights.

    Args:
        keep: Current mask.
        costs: ``[R, C]``, non-negative.
        pattern: N:M, or None for single weights.

    Returns:
        ``[candidates]`` float32.
    """
    if pattern is None:
        return costs[keep.elements].float()
    cheapest = _grouped(costs, pattern).topk(pattern.removed, dim=-1, largest=False).values.sum(-1)
    return cheapest[_whole(keep, pattern)].float()


def whole_groups(keep: ElementMask, after: Tensor, pattern: Pattern) -> Tensor:
    """Mark the groups that were whole in ``keep`` and are still whole in ``after [R, C]``, bool ``[candidates]``."""
    return _grouped(after, pattern).all(-1)[_whole(keep, pattern)]


def _whole(keep: ElementMask, pattern: Pattern) -> Tensor:
    return _grouped(keep.elements, pattern).all(-1)


def select_elements(
    keep: Mapping[str, ElementMask], costs: Mapping[str, Tensor], target_weights: int, pattern: Pattern | None = None
) -> ElementSelection:
    """Remove the lowest scores until ``target_weights`` are left; of equal ones the first go first.

    Args:
        keep: Current masks per layer.
        costs: Costs ``[R, C]`` per layer, non-negative and finite.
        target_weights: Number of weights that must be left.
        pattern: N:M; a group then goes from whole to N of M at once. None removes single weights.
    """
    each = 1 if pattern is None else pattern.removed
    removable = max(0, sum(mask.weights for mask in keep.values()) - target_weights) // each
    threshold, going = largest_threshold(
        (candidate_scores(keep[name], costs[name], pattern) for name in keep), removable
    )
    room, after = removable - going, {}
    for name, mask in keep.items():
        scores = candidate_scores(mask, costs[name], pattern)
        equal = scores == _next_float(threshold) if room else torch.zeros_like(scores, dtype=torch.bool)
        equal &= equal.cumsum(0) <= room
        room -= int(equal.sum())
        after[name] = _without(mask, costs[name], (scores <= threshold) | equal, pattern)
    gone = {name: keep[name].elements & ~mask.elements for name, mask in after.items()}
    some = any(bool((mask.elements if pattern is None else _whole(mask, pattern)).any()) for mask in after.values())
    return ElementSelection(
        after,
        threshold,
        sum(int(mask.sum()) for mask in gone.values()),
        sum(float(costs[name][mask].double().sum()) for name, mask in gone.items()),
        each if some else 0,
    )


def largest_threshold(scores: Iterable[Tensor], removable: int) -> tuple[float, int]:
    """Largest float32 t for which at most ``removable`` of all scores are at most t, and their number.

    The threshold t is -inf if there is none. Unless all scores may go, it is one bit pattern below the next score.

    Two passes count by the halves of the bit pattern. That is exact, ties stay together, and no hundred million numbers
    have to be sorted.

    Args:
        scores: Non-negative, finite float32 tensors; iterated over once, so kept in memory.
        removable: Largest number of scores that may be removed.
    """
    # Adding zero turns -0.0, whose pattern is negative, into 0.0.
    patterns = [(score + 0.0).view(torch.int32) for score in scores]
    upper = _first_bin_over([pattern >> _HALF for pattern in patterns], removable)
    if upper is None:
        largest = (float(pattern.max().view(torch.float32)) for pattern in patterns if len(pattern))
        return max(largest, default=-math.inf), sum(len(pattern) for pattern in patterns)
    bin_, before = upper
    inside = [pattern[pattern >> _HALF == bin_] & ((1 << _HALF) - 1) for pattern in patterns]
    lower = _first_bin_over(inside, removable - before)
    assert lower is not None
    # The smallest pattern that must stay; the threshold is the one just below it.
    stays = (bin_ << _HALF) | lower[0]
    threshold = float(torch.tensor(stays - 1, dtype=torch.int32).view(torch.float32)) if stays else -math.inf
    return threshold, before + lower[1]


def _next_float(threshold: float) -> float:
    """The next float32 after a non-negative threshold; 0 after -inf."""
    return max(0.0, float(torch.tensor(threshold).nextafter(torch.tensor(math.inf))))


def _first_bin_over(keys: list[Tensor], limit: int) -> tuple[int, int] | None:
    """First key at which the running count exceeds ``limit``, and the count before it; None if there is no such key."""
    counts = torch.zeros(1 << _HALF, dtype=torch.int64)
    for key in keys:
        counts += torch.bincount(key.flatten(), minlength=1 << _HALF).cpu()
    running = counts.cumsum(0)
    over = (running > limit).nonzero().flatten()
    if not len(over):
        return None
    first = int(over[0])
    return first, int(running[first] - counts[first])


def keep_highest(scores: Tensor, removed: int) -> Tensor:
    """Keep all but the ``removed`` lowest scores of each row; of equal ones the first go first.

    Args:
        scores: ``[groups, n]``; a comparison group is a row.
        removed: Number of scores that each row loses, at most n.

    Returns:
        bool ``[groups, n]``, True = kept.
    """
    if not removed:
        return torch.ones_like(scores, dtype=torch.bool)
    last = scores.kthvalue(removed, dim=1, keepdim=True).values
    below, equal = scores < last, scores == last
    room = removed - below.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > room).any()):
        equal &= equal.cumsum(1) <= room
    return ~(below | equal)


def keep_in_scope(scores: Tensor, sparsity: float, rowwise: bool, pattern: Pattern | None) -> Tensor:
    """Keep the highest scores of a layer, compared within its rows, within the layer, or within groups for N:M.

    Args:
        scores: ``[R, C]``.
        sparsity: Fraction to remove; not used for N:M.
        rowwise: Whether weights are compared within a row, else within the layer.
        pattern: N:M, which is compared within its groups.

    Returns:
        bool ``[R, C]``, True = kept.
    """
    if pattern is not None:
        return keep_highest(scores.reshape(-1, pattern.group), pattern.removed).view(scores.shape)
    if rowwise:
        return keep_highest(scores, round(sparsity * scores.shape[1]))
    return keep_highest(scores.reshape(1, -1), round(sparsity * scores.numel())).view(scores.shape)


def _without(keep: ElementMask, costs: Tensor, goes: Tensor, pattern: Pattern | None) -> ElementMask:
    """Mask of a layer without the marked ones of its ``candidate_scores``."""
    if pattern is None:
        left = keep.elements.clone()
        left[keep.elements] = ~goes
        return ElementMask(left)
    whole = _whole(keep, pattern)
    marked = torch.zeros_like(whole)
    marked[whole] = goes
    grouped = _grouped(costs, pattern)
    cheapest = grouped.topk(pattern.removed, dim=-1, largest=False).indices
    lost = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, cheapest, True) & marked[..., None]
    return ElementMask(keep.elements & ~lost.view_as(keep.elements))


def _grouped(values: Tensor, pattern: Pattern) -> Tensor:
    """View ``[R, C]`` as ``[R, C / group, group]``: groups are of consecutive inputs."""
    return values.view(len(values), -1, pattern.group)
