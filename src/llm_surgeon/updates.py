"""How the kept weights change when rows or columns go: pure functions, exact for the whole removed set.

Shapes: ``weight [R, C]``, a bias being its last column; ``a [C, C]`` and ``g [R, R]``. Sets are long index tensors.

For removed rows R' and kept rows K the update of paper, eq. 27, ``-G^-1 E^T (E G^-1 E^T)^-1 W_R'``, read on the
kept rows is ``G_KK^-1 G_KR' W_R'``: by block inversion ``[G^-1]_KR' [G^-1]_R'R'^-1 = -G_KK^-1 G_KR'``. It needs one
Cholesky decomposition of the kept block and no inverse. Columns are alike (eq. 28). Columns after rows, on the
updated weights, is the exact joint minimiser, as the row solution acts from the left and the column solution from
the right: ``W_KM = [I Q] W [I; P]``.

What is neither removed nor kept (structures that died by implication) takes no part: it has no effect on the
network, so nothing is gained or lost by compensating with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_surgeon.linalg import damped_cholesky


def remove_rows(weight: Tensor, g: Tensor, removed: Tensor, kept: Tensor, damping: float, name: str) -> Tensor:
    """Kept rows ``[K, C]`` after the removal of rows R': ``W_K + G_KK^-1 G_KR' W_R'`` with damped ``G``.

    Args:
        weight: ``[R, C]``.
        g: Undamped gradient factor ``[R, R]``.
        removed: Rows to compensate for.
        kept: Rows that stay, in the order wanted.
        damping: Lambda, which is added to the diagonal of ``g``.
        name: What ``g`` is, for error messages.

    Raises:
        NotPositiveDefiniteError: If the kept block has no decomposition even with more damping.
    """
    if not len(removed) or not len(kept):
        return weight[kept]
    cross = g[kept][:, removed] @ weight[removed]
    return weight[kept] + torch.cholesky_solve(cross, damped_cholesky(g[kept][:, kept], damping, name))


def remove_columns(weight: Tensor, a: Tensor, removed: Tensor, kept: Tensor, damping: float, name: str) -> Tensor:
    """Kept columns ``[R, M]`` after the removal of columns C': ``W_M + W_C' A_C'M A_MM^-1``; see ``remove_rows``."""
    return remove_rows(weight.T, a, removed, kept, damping, name).T
