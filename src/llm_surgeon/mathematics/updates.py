"""Updates of the kept weights after a removal of rows, columns or single weights, exact for the whole removed set.

Pure functions of tensors.

Shapes: ``weight [R, C]``, a bias being its last column; ``a [C, C]`` and ``g [R, R]``. Sets are long index tensors.

For removed rows R' and kept rows K the update of paper, eq. 27, ``-G^-1 E^T (E G^-1 E^T)^-1 W_R'``, read on the
kept rows is ``G_KK^-1 G_KR' W_R'``: by block inversion ``[G^-1]_KR' [G^-1]_R'R'^-1 = -G_KK^-1 G_KR'``. It needs one
Cholesky decomposition of the kept block and no inverse. Columns are alike (eq. 28). Columns after rows, on the
updated weights, is the exact joint minimiser, as the row solution acts from the left and the column solution from
the right: ``W_KM = [I Q] W [I; P]``.

Structures that are neither removed nor kept, because they died by implication, take no part: they have no effect on
the network, so nothing is gained or lost by compensating with them.

Single weights: ``remove_elements`` finds the exact minimiser over all kept weights at once. Removing them in groups,
one after the other, with removed weights held at zero, would give the same weights whatever the groups: each step is
the F-orthogonal projection onto the weights left, and projections onto nested subspaces compose to the last one. A
size of groups can therefore only mean which correlations are *left out*, those between groups: the ``independent``
functions compute the update of each group as if the others stayed, and add them (groups of one: the paper's
independent updates, eq. 17 and 22).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llm_surgeon.mathematics.linalg import batched_solve, damped_cholesky


def remove_rows(weight: Tensor, g: Tensor, removed: Tensor, kept: Tensor, damping: float, name: str) -> Tensor:
    """Kept rows ``[K, C]`` after the removal of rows R': ``W_K + G_KK^-1 G_KR' W_R'`` with damped ``G``.

    Args:
        weight: ``[R, C]``.
        g: Undamped gradient factor ``[R, R]``.
        removed: Rows to compensate for.
        kept: Rows that stay, in the order wanted.
        damping: Lambda, which is added to the diagonal of ``g``.
        name: Name of ``g``, for error messages.

    Raises:
        NotPositiveDefiniteError: If the kept block has no decomposition even with more damping.
    """
    if not len(removed) or not len(kept):
        return weight[kept]
    own = g[kept]
    factor, cross = damped_cholesky(own[:, kept], damping, name), own[:, removed]
    if len(removed) < weight.shape[1]:
        # This way there are fewer right-hand sides to solve for.
        return weight[kept] + torch.cholesky_solve(cross, factor) @ weight[removed]
    return weight[kept] + torch.cholesky_solve(cross @ weight[removed], factor)


def remove_columns(weight: Tensor, a: Tensor, removed: Tensor, kept: Tensor, damping: float, name: str) -> Tensor:
    """Kept columns ``[R, M]`` after the removal of columns C': ``W_M + W_C' A_C'M A_MM^-1``; see ``remove_rows``."""
    return remove_rows(weight.T, a, removed, kept, damping, name).T


def remove_rows_independently(
    weight: Tensor, g_inverse: Tensor, removed: Tensor, kept: Tensor, size: int, name: str
) -> Tensor:
    """Change ``[K, C]`` of the kept rows when groups of removed rows do not know of one another.

    Row group R' alone changes the weights by ``-G^-1_:R' (G^-1_R'R')^-1 W_R'`` (paper, eq. 27; for one row eq. 22).

    Args:
        weight: ``[R, C]``.
        g_inverse: Inverse of the damped gradient factor ``[R, R]``.
        removed: Rows to compensate for; neighbours in this order form groups.
        kept: Rows that stay, in the order wanted.
        size: Rows in a group, at most.
        name: Name of the factor, for error messages.

    Returns:
        The change, to be added to ``weight[kept]``.

    Raises:
        NotPositiveDefiniteError: If a group's block has no Cholesky decomposition.
    """
    multipliers = torch.zeros(len(removed), weight.shape[1], dtype=weight.dtype, device=weight.device)
    for index, valid in groups(torch.ones(len(removed), dtype=torch.long), size):
        rows = removed[index.to(removed.device)]
        system = g_inverse[rows[:, :, None], rows[:, None, :]]
        multipliers[index[valid].to(removed.device)] = _solve_groups(system, weight[rows], valid, name)
    return -g_inverse[kept][:, removed] @ multipliers


def remove_elements(
    weight: Tensor,
    kept: Tensor,
    fisher: Callable[[Tensor], Tensor],
    diagonal: Tensor,
    *,
    steps: int,
    tolerance: float,
) -> Tensor:
    """All kept weights after the removal of single weights: the minimiser of ``1/2 <D, F D>`` with the rest at zero.

    ``D = X - W`` where X is zero wherever nothing is kept, so the constraints (what goes now and what went before)
    hold exactly at every step. The equations ``[F (X - W)]_kept = 0`` are solved by conjugate gradients with the
    diagonal as preconditioner; each step costs one product with the Fisher, ``G D A`` for one Kronecker product, and
    lowers the predicted loss. The system of paper, eq. 16, over the removed weights has the same solution, but is
    dense and as large as the number of weights that were ever removed.

    Args:
        weight: ``[R, C]``.
        kept: bool ``[R, C]``, True where the weight stays.
        fisher: Product of the damped Fisher with a matrix ``[R, C]``.
        diagonal: Diagonal of the damped Fisher, ``[R, C]``, positive.
        steps: Steps at most.
        tolerance: Stop once the preconditioned residual has fallen to this fraction of its start.

    Returns:
        ``[R, C]``, zero where not kept.
    """
    mask = kept.to(weight.dtype)
    x = weight * mask
    residual = fisher(weight - x) * mask
    direction = residual / diagonal
    square = first = float((residual * direction).sum())
    for _ in range(steps):
        if square <= tolerance**2 * first:
            break
        image = fisher(direction) * mask
        curvature = float((direction * image).sum())
        if not curvature:
            # The curvature underflows: the gain that is left is less than the type can hold.
            break
        length = square / curvature
        x.add_(direction, alpha=length)
        residual.sub_(image, alpha=length)
        scaled = residual / diagonal
        before, square = square, float((residual * scaled).sum())
        direction = scaled.add_(direction, alpha=square / before)
    return x


def remove_elements_independently(
    weight: Tensor, kept: Tensor, g_inverse: Tensor, a_inverse: Tensor, size: int, name: str
) -> Tensor:
    """All kept weights after the removal of single weights in groups that do not know of one another.

    Group Q alone needs the multipliers ``mu`` with ``(G^-1_rr' A^-1_cc')_QQ mu = w_Q`` and changes the weights by
    ``-G^-1 M A^-1``, where M holds mu at Q (paper, eq. 16). Weights that went before are part of the groups, as
    constraints with ``w = 0``. Whole rows stay together where they fit.

    Args:
        weight: ``[R, C]``.
        kept: bool ``[R, C]``, True where the weight stays.
        g_inverse: Inverse of the damped gradient factor ``[R, R]``.
        a_inverse: Inverse of the damped input factor ``[C, C]``.
        size: Weights in a group, at most.
        name: Name of the layer, for error messages.

    Returns:
        ``[R, C]``, zero where not kept.

    Raises:
        NotPositiveDefiniteError: If a group's system has no Cholesky decomposition.
    """
    rows, columns = (~kept).nonzero(as_tuple=True)
    multipliers = torch.zeros_like(weight)
    for index, valid in groups((~kept).sum(1), size):
        r, c = rows[index.to(rows.device)], columns[index.to(rows.device)]
        system = g_inverse[r[:, :, None], r[:, None, :]] * a_inverse[c[:, :, None], c[:, None, :]]
        solved = _solve_groups(system, weight[r, c][:, :, None], valid, name)
        inside = valid.to(rows.device)
        multipliers[r[inside], c[inside]] = solved[:, 0]
    return (weight - g_inverse @ multipliers @ a_inverse) * kept


# Numbers in the systems that are solved at once, at most: 64 MiB of float32.
_SOLVED_AT_ONCE = 1 << 24


def groups(runs: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut positions into groups of at most ``size``; runs of neighbours stay together where they fit.

    Args:
        runs: ``[n]``, positions in each run (a row's removed weights); a run longer than ``size`` is cut.
        size: Positions in a group, at most.

    Yields:
        Batches of groups: positions ``[groups, longest]``, and a mask of the same shape, False where they are padding.
    """
    bounds = [0]
    position = 0
    for run in runs.tolist():
        if position + run - bounds[-1] > size and position > bounds[-1]:
            bounds.append(position)
        position += run
        bounds.extend(range(bounds[-1] + size, position, size))
    starts, ends = torch.tensor(bounds), torch.tensor([*bounds[1:], position])
    # Groups of like lengths go into one batch, so that little is padding.
    order = (ends - starts).argsort(descending=True)
    while len(order):
        longest = int((ends - starts)[order[0]])
        if not longest:
            return
        now, order = order.tensor_split([max(1, _SOLVED_AT_ONCE // longest**2)])
        index = starts[now, None] + torch.arange(longest)
        valid = index < ends[now, None]
        yield index * valid, valid


def _solve_groups(system: Tensor, right: Tensor, valid: Tensor, name: str) -> Tensor:
    """Solve ``system [groups, n, n]`` for ``right [groups, n, k]``; returns rows without padding, ``[valid, k]``."""
    valid = valid.to(system.device)
    both = valid[:, :, None] & valid[:, None, :]
    eye = torch.eye(system.shape[1], dtype=system.dtype, device=system.device)
    return batched_solve(torch.where(both, system, eye), right * valid[:, :, None], name)[valid]
