"""What removing a structure costs: pure functions of a weight matrix and its Kronecker factors.

Shapes: ``weight [R, C]``, a bias being its last column; ``A [C, C]``, ``G [R, R]``, so that the Fisher of the
row-major weights is ``kron(G, A)``. A factor given as None is the identity. Inverses are of the damped factors,
numerators of the undamped (mathematics of optimal brain surgeon: paper, eq. 17 to 22).

Optimal brain damage takes what is removed for independent of what stays: the diagonal of an inverse is then the
inverse of the diagonal (paper, eq. 18 and 23), so its costs are the same functions with ``1 / diag(G)`` in place of
``diag(G^-1)``.
"""

from __future__ import annotations

from torch import Tensor


def element_costs(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """OBS cost of each weight: ``1/2 w_rc^2 / [F^-1]_rc,rc`` (paper, eq. 17).

    Args:
        weight: ``[R, C]``.
        inverse_diagonal: Diagonal of the inverse Fisher as a matrix ``[R, C]``, for one Kronecker product
            ``[G^-1]_rr [A^-1]_cc``; or what broadcasts to it.

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
    projected = weight if a is None else weight @ a
    return 0.5 * (projected * weight).sum(1) / g_inverse_diagonal


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
