"""SparseGPT (Frantar & Alistarh, ICML 2023): mask and update of one layer in one sweep over its columns.

The layer's squared output error is ``tr(D A D^T)`` for a change D of its weights ``[R, C]`` and the Gram matrix
``A [C, C]`` of its inputs, so rows are independent and optimal brain surgeon gives, for one row, the cost
``w_c^2 / [A^-1]_cc`` of removing weight c and the change of all others that makes up for it. SparseGPT goes through the
columns from left to right and lets only the columns to the right make up for a loss. Columns to the left are fixed, so
all rows share one sequence of inverses, of ``A`` restricted to the columns not yet passed. All of them are in one
triangular factor: with ``A^-1 = U^T U`` and U upper triangular, the first row of the inverse of ``A_{c:,c:}`` is
``U_cc U_c,c:``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_surgeon.mathematics.linalg import damped_cholesky
from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.mathematics.unstructured_selection import keep_highest


@dataclass(frozen=True)
class Solution:
    """Solution of one layer: weights ``[R, C]``, zero where ``keep [R, C]`` is False."""

    weight: Tensor
    keep: Tensor


def inverse_factor(a: Tensor, damping: float, name: str) -> Tensor:
    """Upper triangular U with ``(A + damping I)^-1 = U^T U``, ``[C, C]``.

    With the order of rows and columns reversed, the lower Cholesky factor of A becomes an upper V with ``A = V V^T``,
    so ``U = V^-1``: one decomposition, and no inverse that would have to be decomposed once more.

    Args:
        a: Symmetric ``[C, C]``.
        damping: Added to the diagonal.
        name: Name of ``a``, for messages.

    Raises:
        NotPositiveDefiniteError: If there is no decomposition even with more damping.
        NonFiniteError: If ``a`` is not finite.
    """
    upper = damped_cholesky(a.flip(0, 1), damping, name).flip(0, 1)
    eye = torch.eye(len(a), dtype=a.dtype, device=a.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse


def solve(
    weight: Tensor, factor: Tensor, sparsity: float, pattern: Pattern | None = None, block: int = 128
) -> Solution:
    """Prune one layer by SparseGPT.

    Columns are taken in blocks. The mask of a block is chosen when the block is reached, on the weights as updated by
    then, by ``w_c^2 / U_cc^2``: among all weights of the block, or for N:M in each group when the group is reached.
    Columns beyond the block get the block's update at once, which is one matrix product.

    Args:
        weight: ``[R, C]``, without the bias.
        factor: U of ``inverse_factor``, ``[C, C]``.
        sparsity: Fraction to remove, met exactly over the layer; for N:M the pattern's.
        pattern: N:M, or None for single weights.
        block: Columns in a block; need not divide C. For N:M it is rounded up to whole groups.

    Returns:
        The new weights and the keep mask.
    """
    rows, columns = weight.shape
    if pattern is not None:
        block = -(-block // pattern.group) * pattern.group
    weight, keep = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        count = round(sparsity * rows * end) - round(sparsity * rows * start)
        inner = _Block(weight[:, start:end], factor[start:end, start:end], keep[:, start:end])
        if pattern is None:
            inner.choose(count)
        errors = inner.sweep(pattern)
        weight[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return Solution(weight * keep, keep)


class _Block:
    """A block of neighbouring columns; works in place on views of the layer's weights and mask."""

    def __init__(self, weight: Tensor, factor: Tensor, keep: Tensor) -> None:
        self._weight, self._factor, self._keep = weight, factor, keep
        self._diagonal = factor.diagonal()

    def choose(self, count: int) -> None:
        """Mark the ``count`` weights of least cost as removed."""
        costs = (self._weight / self._diagonal).square()
        self._keep.copy_(keep_highest(costs.flatten()[None], count).view_as(costs))

    def sweep(self, pattern: Pattern | None) -> Tensor:
        """Remove column after column and let the columns to its right make up; returns the errors ``[R, columns]``."""
        errors = torch.empty_like(self._weight)
        for column in range(self._weight.shape[1]):
            if pattern is not None and column % pattern.group == 0:
                group = slice(column, column + pattern.group)
                costs = (self._weight[:, group] / self._diagonal[group]).square()
                self._keep[:, group] = keep_highest(costs, pattern.removed)
            lost = self._weight[:, column] * ~self._keep[:, column]
            errors[:, column] = lost / self._diagonal[column]
            # The column itself becomes zero where it is removed.
            self._weight[:, column:].addr_(errors[:, column], self._factor[column, column:], alpha=-1)
        return errors
