"""DSnoT, a refinement of masks without training: swaps of removed and kept weights restore the expected output.

Pure functions of tensors. Shapes: ``weight [R, C]`` without a bias, ``keep [R, C]`` bool (True = kept), and for each
input c over the calibration tokens its mean ``E[x_c]``, variance ``Var(x_c)`` and L2 norm ``||x_c||``, each ``[C]``.

DSnoT (Zhang et al., "Dynamic Sparse No Training", ICLR 2024) looks at what row r loses in expectation,
``d_r = sum over removed c of W_rc E[x_c]``. A swap revives ("grows") a removed weight and prunes a kept one, each of
which brings d_r closer to zero:

- grow: among the removed weights whose ``W_rc E[x_c]`` has the sign of d_r, the one of the largest
  ``|W_rc E[x_c]| / Var(x_c)``;
- prune: among the kept weights whose ``W_rc E[x_c]`` has the other sign, the one of the least ``|W_rc| ||x_c||``.

With N:M the two come from the same group of M consecutive inputs; a removed weight whose group holds nothing to swap
it for is no candidate. A row stops once |d_r| is at most the threshold, d_r has changed its sign, or a swap would not
make |d_r| strictly smaller; that swap is not done. The values of the weights never change.

While the sign of d_r lasts, a revived weight cannot be a candidate for pruning, nor a pruned one for growing. So the
order of both within a group is known before the first swap, the i-th of one goes with the i-th of the other, and a
cumulative sum over a row's pairs, the best first, is d_r after each swap. There is nothing to repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Weights that are worked on at once: 16 MiB of float32, and a dozen such tensors.
_AT_ONCE = 1 << 22
# A variance counts as at least this share of the mean square of an input, on average over the inputs.
_LEAST_VARIANCE = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Refinement:
    """Options of the refinement of a mask.

    R2-DSnoT ("Symmetric Pruning of Large Language Models") is a *reading* of that paper, as its exact constants were
    not available: with ``D_rc = 1 / ||W~_r:||_1 + 1 / ||W~_:c||_1``, where W~ is the masked weight at the start, the
    metric for growing is ``|W_rc E[x_c]| D_rc / Var(x_c) + gamma_grow |W_rc|`` and that for pruning
    ``|W_rc| ||x_c||^alpha D_rc + gamma_prune |W_rc|``, among the weights with the right sign. The paper's ablation:
    the relative weights D help in either step, and harm in both. A step without them is DSnoT's with its gamma term.

    Attributes:
        cycles: Swaps in a row, at most.
        threshold: A row is left alone once ``|d_r|`` is at most this, in units of the layer's output.
        reweight: The step with relative weights; None is DSnoT, which has no gamma terms.
        alpha: Exponent of the input's norm in a reweighted pruning step.
        gamma_grow: Regulariser of the growing step. With usual weights and inputs the default is some thousandths of
            the term that it is added to; the regularisers matter little.
        gamma_prune: Regulariser of the pruning step.
    """

    cycles: int = 50
    threshold: float = 0.1
    reweight: Literal["grow", "prune", "both"] | None = None
    alpha: float = 0.5
    gamma_grow: float = 1e-4
    gamma_prune: float = 1e-4


def expected_error(weight: Tensor, keep: Tensor, mean: Tensor) -> Tensor:
    """Expected loss of each output: ``d_r = sum over removed c of W_rc E[x_c]`` (DSnoT).

    Args:
        weight: ``[R, C]``.
        keep: ``[R, C]`` bool.
        mean: ``[C]``.

    Returns:
        ``[R]`` float64, in units of the layer's output.
    """
    return (weight * mean).masked_fill(keep, 0.0).sum(1, dtype=torch.float64)


def refine(
    weight: Tensor,
    keep: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    how: Refinement,
    group: int | None = None,
) -> Tensor:
    """Refine a mask by the swaps of DSnoT or R2-DSnoT; each row, with N:M each group, keeps as many weights as before.

    ``|d_r|`` of no row increases. Ties go to the first position, so equal arguments give equal masks. An input that
    is always zero has no part in d_r and none in any swap. A constant one, of variance zero, has: its metric for
    growing is that of a tiny variance instead, so such inputs come first, ordered by ``|W_rc E[x_c]|``.

    Args:
        weight: ``[R, C]``; below float32 it is read as float32.
        keep: ``[R, C]`` bool.
        mean: ``E[x_c]``, ``[C]``, finite.
        variance: ``Var(x_c)``, ``[C]``, finite.
        norm: ``||x_c||``, ``[C]``, finite.
        how: The metrics, and when to stop.
        group: M of a pattern N:M, which divides C; None swaps within the whole row.

    Returns:
        ``[R, C]`` bool.

    Raises:
        RuntimeError: If the group does not divide C.
    """
    weight = weight if weight.dtype == torch.float64 else weight.float()
    mean, variance, norm = (statistic.to(weight) for statistic in (mean, variance, norm))
    group = group or weight.shape[1]
    floor = _LEAST_VARIANCE * (variance.clamp_min(0) + mean.square()).mean()
    variance = variance.clamp_min(max(float(floor), torch.finfo(weight.dtype).tiny))
    row_share, column_share = _shares(weight, keep) if how.reweight else (None, None)
    after = keep.clone()
    for rows in torch.arange(len(weight), device=weight.device).split(max(1, _AT_ONCE // weight.shape[1])):
        error = expected_error(weight[rows], keep[rows], mean)
        active = error.abs() > how.threshold
        rows, error = rows[active], error[active]
        w, kept = weight[rows], keep[rows]
        relative = None if row_share is None or column_share is None else row_share[rows, None] + column_share
        # Reviving a weight takes this off |d_r|, and removing it adds this to |d_r|.
        benefit = w * mean * error.sign().to(w)[:, None]
        grow = _growing_metric(w, benefit, variance, relative, how)
        prune = _pruning_metric(w, norm, relative, how)
        after[rows] = _swap(
            kept,
            benefit,
            # The largest value is the best candidate of either kind, and minus infinity is none.
            grow.masked_fill(kept | (benefit <= 0), -torch.inf),
            (-prune).masked_fill(~kept | (benefit >= 0), -torch.inf),
            error.abs(),
            how,
            group,
        )
    return after


def _growing_metric(w: Tensor, benefit: Tensor, variance: Tensor, relative: Tensor | None, how: Refinement) -> Tensor:
    metric = benefit / variance
    if relative is None:
        return metric
    if how.reweight != "prune":
        metric = metric * relative
    return metric + how.gamma_grow * w.abs()


def _pruning_metric(w: Tensor, norm: Tensor, relative: Tensor | None, how: Refinement) -> Tensor:
    if relative is None:
        return w.abs() * norm
    metric = w.abs() * norm if how.reweight == "grow" else w.abs() * norm**how.alpha * relative
    return metric + how.gamma_prune * w.abs()


def _shares(weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of D, ``1 / ||W~_r:||_1 [R]`` and ``1 / ||W~_:c||_1 [C]``, of the masked weight."""
    masked = weight.abs().masked_fill(~keep, 0.0)
    return _inverse(masked.sum(1)), _inverse(masked.sum(0))


def _inverse(norms: Tensor) -> Tensor:
    """Invert norms; a norm of zero counts as the least positive one, and if all are zero their inverses are zero.

    A column without any kept weight is then treated as the weakest of those that have some, instead of as infinitely
    important.
    """
    positive = norms[norms > 0]
    return 1 / norms.clamp_min(positive.min()) if len(positive) else torch.zeros_like(norms)


def _swap(
    kept: Tensor, benefit: Tensor, grow: Tensor, prune: Tensor, size: Tensor, how: Refinement, group: int
) -> Tensor:
    """Pair the candidates of each row and swap pair after pair, up to the first swap that is refused.

    Args:
        kept: ``[r, C]`` bool, the mask of some rows.
        benefit: ``[r, C]``; reviving a weight takes this off ``|d|``, and removing it adds this to ``|d|``.
        grow: ``[r, C]``, metric of each weight as a candidate for growing; minus infinity: no candidate.
        prune: ``[r, C]``, metric of each weight as a candidate for pruning; minus infinity: no candidate.
        size: ``[r]`` float64, ``|d|`` at the start.
        how: When to stop.
        group: Size of the groups within which weights are swapped.

    Returns:
        ``[r, C]`` bool.
    """
    most = min(how.cycles, group)
    first = torch.arange(0, kept.shape[1], group, device=kept.device)[:, None]
    grow, revived = _largest(grow.unflatten(1, (-1, group)), most)
    prune, pruned = _largest(prune.unflatten(1, (-1, group)), most)
    # Pairs come by group and rank within it, so a stable sort leaves ties in the order of positions.
    metric = grow.masked_fill(prune == -torch.inf, -torch.inf).flatten(1)
    metric, order = _largest(metric, min(how.cycles, metric.shape[1]))
    revived = (revived + first).flatten(1).gather(1, order)
    pruned = (pruned + first).flatten(1).gather(1, order)
    gain = (benefit.gather(1, revived) - benefit.gather(1, pruned)).double()
    left = size[:, None] - gain.cumsum(1)
    before = torch.cat([size[:, None], left], dim=1)[:, :-1]
    # |d| carries the sign that d had at the start: once d has changed it, ``before`` is negative.
    done = (metric > -torch.inf) & (before > how.threshold) & (left.abs() < before)
    done = done.cumprod(1).bool()
    # A weight can be among both lists, but is a candidate in one of them only: hence two masks.
    nothing = torch.zeros_like(kept)
    return (kept | nothing.scatter(1, revived, done)) & ~nothing.scatter(1, pruned, done)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Take the ``count`` largest values along the last axis in descending order, ties by position.

    ``topk`` leaves open which of several equal values it takes, and sorting everything for a few is slow (twenty
    times, for 50 of 11008): the least value that is taken comes from ``topk``, and the positions from that.

    Args:
        values: ``[..., n]``.
        count: How many, at most n.

    Returns:
        Values and positions, each ``[..., count]``.
    """
    if count in (0, values.shape[-1]):
        ordered = values[..., :count].sort(dim=-1, descending=True, stable=True)
        return ordered.values, ordered.indices
    least = values.topk(count, dim=-1).values[..., -1:]
    above, equal = values > least, values == least
    room = count - above.sum(-1, keepdim=True)
    positions = (above | (equal & (equal.cumsum(-1) <= room))).nonzero()[:, -1].view(*values.shape[:-1], count)
    ordered = values.gather(-1, positions).sort(dim=-1, descending=True, stable=True)
    return ordered.values, positions.gather(-1, ordered.indices)
