"""Dense brute force, float64: what the fast code has to agree with."""

from __future__ import annotations

import torch
from torch import Tensor


def fisher(a: Tensor, g: Tensor) -> Tensor:
    """``kron(G, A)`` for the row-major weights, ``[RC, RC]``."""
    return torch.kron(g, a)


def constrained_minimum(hessian: Tensor, theta: Tensor, removed: Tensor) -> tuple[float, Tensor]:
    """Minimise ``1/2 d^T H d`` subject to ``d_k = -theta_k`` for removed k, by the KKT system.

    Args:
        hessian: ``[n, n]``.
        theta: ``[n]``.
        removed: bool ``[n]``.

    Returns:
        The minimum and the minimiser ``d [n]``.
    """
    index = removed.nonzero().flatten()
    n, k = len(theta), len(index)
    select = torch.zeros(k, n, dtype=theta.dtype)
    select[torch.arange(k), index] = 1
    system = torch.cat(
        [torch.cat([hessian, select.T], 1), torch.cat([select, torch.zeros(k, k, dtype=theta.dtype)], 1)], 0
    )
    right = torch.cat([torch.zeros(n, dtype=theta.dtype), -theta[index]])
    solution = torch.linalg.solve(system, right)[:n]
    return float(0.5 * solution @ hessian @ solution), solution


def random_factor(size: int, generator: torch.Generator) -> Tensor:
    """A well-conditioned symmetric positive definite matrix, float64."""
    x = torch.randn(3 * size, size, generator=generator, dtype=torch.float64)
    return x.T @ x / (3 * size)


def removed_mask(rows: int, columns: int, r: Tensor, c: Tensor) -> Tensor:
    """Row-major mask ``[rows * columns]`` of the weights in the given rows and columns."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    mask[r] = True
    mask[:, c] = True
    return mask.flatten()
