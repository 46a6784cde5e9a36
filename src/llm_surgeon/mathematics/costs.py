"""Costs of removing weights, rows and columns: pure functions of a weight matrix and its Kronecker factors.

Shapes: ``weight [R, C]``, a bias being its last column; ``A [C, C]``, ``G [R, R]``, so that the Fisher of the
row-major weights is ``kron(G, A)``. A factor given as None is the identity. Inverses are of the damped factors,
numerators of the undamped (mathematics of optimal brain surgeon: paper, eq. 17 to 22).

Optimal brain damage takes what is removed for independent of what stays: the diagonal of an inverse is then the
inverse of the diagonal (paper, eq. 18 and 23), so its costs are the same functions with ``1 / diag(G)`` in place of
``diag(G^-1)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_surgeon.mathematics.linalg import batched_solve, quadratic_forms


def element_costs(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """OBS cost of each weight: ``1/2 w_rc^2 / [F^-1]_rc,rc`` (paper, eq. 17).

    Args:
        weight: ``[R, C]``.
        inverse_diagonal: Diagonal of the inverse Fisher as a matrix ``[R, C]``, for one Kronecker product
            ``[G^-1]_rr [A^-1]_cc``; any shape that broadcasts to it will do.

    Returns:
        ``[R, C]``, in nats of the loss that the factors were taken of.
    """
    return 0.5 * weight * weight / inverse_diagonal


def row_costs(weight: Tensor, a: Tensor | None, g_inverse_diagonal: Tensor) -> Tensor:
    """OBS cost of each row: ``1/2 w_r^T A w_r / [G^-1]_rr`` (paper, eq. 22).

    Removing row r constrains C weights. With ``E = e_r^T (x) I`` the general cost
    ``1/2 (E w)^T (E F^-1 E^T)^-1 E w`` has ``E (G^-1 (x) A^-1) E^T = [G^-1]_rr A^-1``.

    Args:
        weight: ``[R, C]``.
        a: Undamped input factor ``[C, C]``.
        g_inverse_diagonal: Diagonal of the inverse of the damped gradient factor, ``[R]``.

    Returns:
        ``[R]``, in nats of the loss that the factors were taken of.
    """
    energy = weight.square().sum(1) if a is None else quadratic_forms(weight, a)
    return 0.5 * energy / g_inverse_diagonal


def column_costs(weight: Tensor, g: Tensor | None, a_inverse_diagonal: Tensor) -> Tensor:
    """OBS cost of each column: ``1/2 w_c^T G w_c / [A^-1]_cc`` (paper, eq. 22); the mirror image of ``row_costs``.

    Args:
        weight: ``[R, C]``.
        g: Undamped gradient factor ``[R, R]``.
        a_inverse_diagonal: Diagonal of the inverse of the damped input factor, ``[C]``.

    Returns:
        ``[C]``, in nats of the loss that the factors were taken of.
    """
    return row_costs(weight.T, g, a_inverse_diagonal)


def row_set_costs(
    weight: Tensor,
    a: Tensor | None,
    g: Tensor | None,
    g_inverse: Tensor | None,
    sets: Tensor,
    valid: Tensor,
    name: str,
) -> Tensor:
    """Joint cost of each of several sets of rows: ``1/2 tr([G^-1]_SS^-1 W_S A W_S^T)``.

    With ``E`` selecting all weights of the rows S, ``E (G^-1 (x) A^-1) E^T = [G^-1]_SS (x) A^-1``, whose inverse is
    ``[G^-1]_SS^-1 (x) A``, so that the general cost ``1/2 (E w)^T (E F^-1 E^T)^-1 E w`` (paper, eq. 16) is the trace.
    Rows that could make up for each other cost more together than one by one: by block inversion ``[G^-1]_SS^-1`` is
    what is left of ``G_SS`` once the rows that *stay* have been regressed out. For one row it is ``row_costs``.

    If nothing makes up for a loss (optimal brain damage), ``G_SS`` stands in place of ``[G^-1]_SS^-1``.

    Args:
        weight: ``[R, C]``.
        a: Undamped input factor ``[C, C]``; None is the identity.
        g: Undamped gradient factor ``[R, R]``, if nothing makes up for a loss; None is the identity.
        g_inverse: Inverse of the damped gradient factor ``[R, R]``; None: nothing makes up for a loss.
        sets: Rows of each set ``[n, members]``.
        valid: Which entries of ``sets`` are meant, ``[n, members]``.
        name: Name of the layer, for error messages.

    Returns:
        ``[n]``, in nats of the loss that the factors were taken of.

    Raises:
        NotPositiveDefiniteError: If a set's system has no decomposition.
    """
    left, above = sets[:, :, None], sets[:, None, :]
    both = valid[:, :, None] & valid[:, None, :]
    eye = torch.eye(sets.shape[1], dtype=weight.dtype, device=weight.device)
    projected = weight if a is None else weight @ a
    energy = (projected @ weight.T)[left, above] * both
    if g_inverse is None:
        return 0.5 * (energy * (eye if g is None else g[left, above])).sum((1, 2))
    system = torch.where(both, g_inverse[left, above], eye)
    return 0.5 * batched_solve(system, energy, name).diagonal(dim1=1, dim2=2).sum(1)
