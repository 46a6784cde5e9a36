"""Permutation of input channels for N:M patterns: an order that spreads important channels over the groups.

Pure functions of tensors. Shapes: ``scores [R, C]``, non-negative, what keeping each weight is worth; weights of
several layers that read the same channels are stacked along R. A pattern N:M keeps, in each row, the N best of every
M consecutive channels, so which channels are neighbours decides how much is kept. As in RIA (Zhang et al.,
"Plug-and-Play", ICLR 2024), channels are first dealt to the groups by their total score, then one channel of each
group at a time is reassigned optimally.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from llm_surgeon.mathematics.nm_pattern import Pattern

# Numbers in an intermediate result. On a processor 2 MiB of float32 stay in its cache, which makes the work three times
# as fast. An accelerator needs more work at a time.
_AT_ONCE_CPU, _AT_ONCE_ACCELERATOR = 1 << 19, 1 << 26


def retained(scores: Tensor, pattern: Pattern) -> float:
    """Total score that the pattern keeps: the sum over rows and groups of the N largest scores.

    Args:
        scores: ``[R, C]``, C a multiple of M.
        pattern: N:M.
    """
    return float(scores.unflatten(1, (-1, pattern.group)).topk(pattern.kept, dim=-1).values.sum(dtype=torch.float64))


def find_permutation(scores: Tensor, pattern: Pattern, sweeps: int = 1) -> Tensor:
    """Find an order of the channels in which the pattern retains more, or at least no less, than in the present order.

    One sweep takes each of the M positions of all groups in turn, at the cost of ``R (C / M)^2`` operations each.

    Args:
        scores: ``[R, C]``, non-negative, C a multiple of M.
        pattern: N:M.
        sweeps: Sweeps at most; zero only deals the channels. The search ends early if a sweep changes nothing.

    Returns:
        Long ``[C]``: channel ``i`` of the new order is channel ``permutation[i]`` of the old one, so the new scores
        are ``scores[:, permutation]``. The identity if nothing better is found.

    Raises:
        RuntimeError: If M does not divide C.
    """
    scores = scores if scores.dtype == torch.float64 else scores.float()
    channels = scores.T.contiguous()
    groups = deal(scores.sum(0, dtype=torch.float64), pattern.group)
    for _ in range(sweeps):
        before = groups
        for position in range(pattern.group):
            groups = _reassign(channels, groups, position, pattern.kept)
        if torch.equal(groups, before):
            break
    permutation = groups.sort(dim=1).values.flatten()
    if retained(scores[:, permutation], pattern) > retained(scores, pattern):
        return permutation
    return torch.arange(len(permutation), device=scores.device)


def deal(totals: Tensor, group: int) -> Tensor:
    """Deal channels to groups like cards, the best first, and in every other round from the last group to the first.

    Args:
        totals: ``[C]``, the total score of each channel.
        group: Channels in a group, a divisor of C.

    Returns:
        Long ``[C / group, group]``, the channels of each group.
    """
    ranked = totals.argsort(descending=True, stable=True)
    rounds = ranked.view(group, len(ranked) // group)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.contiguous()


def assignment_benefit(others: Tensor, candidates: Tensor, kept: int) -> Tensor:
    """Score that each group would retain with each candidate as its last member, up to a constant of the group.

    Row r of group i keeps the N best of its M - 1 other channels o and the candidate x, which is
    ``(sum of the N - 1 largest of o) + max(v, x)``, where v is the N-th largest of o: either x is among the best N,
    in place of v, or it is not. As N < M, there always is such a v. The first term does not depend on the candidate.

    Args:
        others: ``[groups, M - 1, R]``, scores of the channels that stay.
        candidates: ``[groups, R]``, scores of the channels to be assigned.
        kept: N.

    Returns:
        ``[groups, candidates]`` float64, ``sum over r of max(v_ir, x_jr)``.
    """
    at_once = _AT_ONCE_CPU if others.device.type == "cpu" else _AT_ONCE_ACCELERATOR
    groups, rows = candidates.shape
    length = max(1, min(rows, at_once // groups))
    height = max(1, at_once // (groups * length))
    benefit = torch.zeros(groups, groups, dtype=torch.float64, device=others.device)
    for start in range(0, rows, length):
        part = slice(start, start + length)
        thresholds = others[:, :, part].topk(kept, dim=1).values[:, -1]
        x = candidates[:, part].contiguous()
        for total, threshold in zip(benefit.split(height), thresholds.split(height), strict=True):
            total += torch.maximum(threshold[:, None], x).sum(2)
    return benefit


def _reassign(channels: Tensor, groups: Tensor, position: int, kept: int) -> Tensor:
    """Reassign the channels at one position of ``groups [groups, M]`` optimally; all others stay put."""
    rest = torch.cat([groups[:, :position], groups[:, position + 1 :]], dim=1)
    taken = groups[:, position]
    benefit = assignment_benefit(channels[rest], channels[taken], kept)
    _, chosen = linear_sum_assignment(benefit.cpu().numpy(), maximize=True)
    after = groups.clone()
    after[:, position] = taken[torch.from_numpy(chosen).to(taken.device)]
    return after
