"""Bundles of groups that go together, so that the widths left suit plain model classes and fast kernels.

Pure functions of scored groups. A bundle is one candidate: its cost is the sum of its groups' costs, its gain all that
they free. Every group of a bundle carries its score and its number, so that the bundle goes whole or not at all. The
costs of groups in different layers add up, as the Fisher is block-diagonal; of groups within a layer this is an
approximation, correct if they are not correlated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_surgeon.mathematics.candidates import Group

INFINITY = float("inf")


@dataclass(frozen=True)
class Widths:
    """Widths that the groups of a coupling may leave.

    Attributes:
        multiple: Living groups in a pool are a multiple of this after any removal.
        least: Smallest number of groups that stay in each pool.
        uniform: Whether all couplings keep equally many groups.
        counts: Numbers of living groups that a pool may have after a removal; None allows all.
    """

    multiple: int = 1
    least: int = 0
    uniform: bool = False
    counts: frozenset[int] | None = None

    def allowed(self, alive: int) -> list[int]:
        """Numbers of living groups that a removal may leave in a pool, largest first.

        Args:
            alive: Living groups before the removal.
        """
        return [
            count
            for count in range(alive - 1, self.least - 1, -1)
            if count % self.multiple == 0 and (self.counts is None or count in self.counts)
        ]


def bundle(groups: Sequence[Group], widths: Widths, per_weight: bool = True) -> list[Group]:
    """Score groups of one kind in bundles, so that any threshold leaves the widths wanted.

    Within each pool the candidates are ordered by score. The first bundle holds as many of the cheapest as have to go
    to leave the largest allowed width, each further one as many as lead to the next; the last groups, which have to
    stay, are no candidates. The bundles of the same number of all pools go together, with ``uniform`` those of all
    couplings too.

    Args:
        groups: One per block, of the same kind.
        widths: Widths that may be left.
        per_weight: Whether to rank by cost per weight freed.

    Returns:
        The groups in the same order, with scores, bundle numbers and numberings of the bundles.
    """
    levels = [_levels(group, widths) for group in groups]
    together = [list(range(len(groups)))] if widths.uniform else [[number] for number in range(len(groups))]
    bundled = list(groups)
    for members in together:
        numbering = object()
        count = 1 + max((int(levels[number].max()) for number in members if levels[number].numel()), default=-1)
        cost, freed = torch.zeros(2, count, dtype=torch.float64)
        for number in members:
            level, group = levels[number], groups[number]
            inside = level >= 0
            cost.index_add_(0, level[inside], group.side_costs.amin(0).double()[inside])
            freed.index_add_(0, level[inside], group.freed[inside])
        score = cost / freed.clamp(min=1) if per_weight else cost
        if widths.counts is not None:
            # Bundles of unequal sizes lead to allowed widths in their order only.
            score = score.cummax(0).values
        for number in members:
            level = levels[number]
            scores = torch.where(level >= 0, torch.cat([score, score.new_full((1,), INFINITY)])[level], INFINITY)
            bundled[number] = replace(groups[number], score=scores, bundle=level.clamp(min=0), numbering=numbering)
            bundled[number] = replace(bundled[number], nested=widths.counts is not None)
    return bundled


def bundle_parts(blocks: Sequence[Sequence[Group]], widths: Widths, per_weight: bool = True) -> list[Group]:
    """Score groups of one kind in bundles, where the groups of a block may come from several couplings.

    The couplings of a block count as one: experts are a coupling each, and their number is what a width limits.

    Args:
        blocks: Couplings of each block, of the same kind.
        widths: Widths that may be left.
        per_weight: Whether to rank by cost per weight freed.

    Returns:
        The groups of all blocks in the same order, as ``bundle`` gives them.
    """
    joined = bundle([_joined(groups) for groups in blocks], widths, per_weight)
    result = []
    for groups, whole in zip(blocks, joined, strict=True):
        sizes = [len(group.score) for group in groups]
        pairs = zip(groups, whole.score.split(sizes), whole.bundle.split(sizes), strict=True)
        result += [
            replace(group, score=score, bundle=number, numbering=whole.numbering, nested=whole.nested)
            for group, score, number in pairs
        ]
    return result


def pools_of(groups: Sequence[Group]) -> Tensor:
    """Number of the pool of each group of some couplings, ``[all groups]``."""
    pools = [(torch.zeros(len(g.score), dtype=torch.long), g.coupling.pools) for g in groups]
    return torch.cat([none if own is None else own for none, own in pools])


def _joined(groups: Sequence[Group]) -> Group:
    """One coupling in place of several, whose sides are those of the first and not to be looked at."""
    if len(groups) == 1:
        return groups[0]
    return replace(
        groups[0],
        coupling=replace(groups[0].coupling, pools=pools_of(groups)),
        side_costs=torch.cat([group.side_costs.amin(0, keepdim=True) for group in groups], dim=1),
        freed=torch.cat([group.freed for group in groups]),
        score=torch.cat([group.score for group in groups]),
        bundle=torch.arange(sum(len(group.score) for group in groups)),
    )


def _levels(group: Group, widths: Widths) -> Tensor:
    """Number of each group's bundle, ``[groups]``; -1 where a group has to stay, or is dead."""
    pools = group.coupling.pools
    pools = torch.zeros(len(group.score), dtype=torch.long) if pools is None else pools
    levels = torch.full_like(pools, -1)
    for pool in pools.unique():
        alive = ((pools == pool) & group.score.isfinite()).nonzero().flatten()
        order = alive[group.score[alive].argsort(stable=True)]
        # Groups of one bundle lead from one allowed width to the next; those that no allowed width is without stay.
        before = len(order)
        for number, count in enumerate(widths.allowed(len(order))):
            levels[order[len(order) - before : len(order) - count]] = number
            before = count
    return levels


def merge(groups: Sequence[Group], per_weight: bool = True) -> list[Group]:
    """Merge couplings into one set of candidates: group number g of all couplings goes together.

    Where group g is dead in one coupling, the candidate consists of the others.

    Args:
        groups: Couplings with equally many groups each.
        per_weight: Whether to rank by cost per weight freed.

    Returns:
        The groups in the same order, with common scores, bundle numbers and numbering.
    """
    alive = torch.stack([group.score.isfinite() for group in groups])
    cost = (torch.stack([group.side_costs.amin(0).double() for group in groups]) * alive).sum(0)
    freed = (torch.stack([group.freed for group in groups]) * alive).sum(0)
    score = cost / freed.clamp(min=1) if per_weight else cost
    bundle, numbering = torch.arange(len(score)), object()
    return [
        replace(group, score=torch.where(living, score, INFINITY), bundle=bundle, numbering=numbering)
        for group, living in zip(groups, alive, strict=True)
    ]
