"""The Fisher of one layer as a dense matrix: every cost and every update is slow, dense and right.

A new approximation inherits from ``DenseFisher``, says which matrix it stands for, and overrides the operations that it
does faster; the others are right in the meantime. Tests compare both.

With ``w`` the row-major weights of a layer and ``F [RC, RC]`` their Fisher, a change ``d`` of the weights costs
``1/2 d^T F d`` nats. Of all changes that set the weights of a set S to zero, ``d_S = -w_S``, the cheapest one has
``F_KK d_K = F_KS w_S`` on the others K, the derivative by ``d_K`` being zero there. It costs
``1/2 w_S^T ([F^-1]_SS)^-1 w_S``, as ``([F^-1]_SS)^-1 = F_SS - F_SK F_KK^-1 F_KS`` by block inversion (Hassibi and
Stork 1993 for one weight; van der Ouderaa et al. 2024, eq. 16, for many). If nothing makes up for a loss (optimal brain
damage, LeCun et al. 1989), ``d_K`` is zero and the cost is ``1/2 w_S^T F_SS w_S``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from llm_surgeon.errors import NonFiniteError, NotPositiveDefiniteError
from llm_surgeon.mathematics.fisher import Solver, Split
from llm_surgeon.mathematics.keep_masks import Axis
from llm_surgeon.mathematics.linalg import batched_solve, damping_of, inverse, is_finite
from llm_surgeon.mathematics.updates import groups


class DenseFisher:
    """Any Fisher, from its dense matrix alone, in float64; takes memory for a few matrices ``[RC, RC]``.

    ``cost`` and ``change`` are for any set of weights, and all operations of the ``Fisher`` interface are made of these
    two. Numerators and inverses are of the same damped matrix, as for a sum of two Kronecker products.

    Args:
        matrix: Undamped Fisher ``[RC, RC]`` of the row-major weights, a bias being the last column of a row.
        damping: Fraction of the mean of the diagonal that is added to it where correlations count.
        name: The layer, for messages.
    """

    def __init__(self, matrix: Tensor, damping: float, name: str) -> None:
        self._matrix, self._damping, self._name = matrix.double(), damping, name

    def matrix(self) -> Tensor:
        """The undamped Fisher, ``[RC, RC]`` float64; an approximation may make it of its parts."""
        return self._matrix

    def damped_matrix(self) -> Tensor:
        """The Fisher that costs and updates with correlations are taken from, ``[RC, RC]`` float64."""
        damped = self.matrix().clone()
        damped.diagonal().add_(damping_of(damped, self._damping))
        return damped

    def cost(self, weight: Tensor, removed: Tensor, *, correlated: bool) -> float:
        """Joint cost of a set of weights, in nats; a removal that would gain something costs nothing.

        Args:
            weight: ``[R, C]``.
            removed: bool ``[R, C]``, True for the weights of the set.
            correlated: Whether the other weights make up for the loss.

        Raises:
            NonFiniteError: If the Fisher holds NaN or infinity.
            NotPositiveDefiniteError: If it has no decomposition.
        """
        index = removed.flatten().nonzero().flatten()
        gone = weight.flatten()[index].double()[:, None]
        if correlated:
            image = batched_solve(self._inverse[index][:, index][None], gone[None], self._name)[0]
        else:
            image = self.matrix()[index][:, index] @ gone
        return max(0.0, float(0.5 * (gone * image).sum()))

    def change(self, weight: Tensor, removed: Tensor, alive: Tensor | None = None) -> Tensor:
        """The cheapest change of all weights that sets a set of them to zero, ``[R, C]`` float64.

        Args:
            weight: ``[R, C]``.
            removed: bool ``[R, C]``, True for the weights of the set.
            alive: bool ``[R, C]``, True for the weights of the set and those that can make up for it; None for all.

        Raises:
            NonFiniteError: If the Fisher holds NaN or infinity.
            NotPositiveDefiniteError: If the block of the weights that stay has no decomposition.
        """
        alive = torch.ones_like(removed) if alive is None else alive
        gone, stays = removed.flatten().nonzero().flatten(), (alive & ~removed).flatten().nonzero().flatten()
        theta = weight.flatten().double()
        change = torch.zeros_like(theta)
        change[gone] = -theta[gone]
        if len(gone) and len(stays):
            own = self._damped[stays]
            factor = self._cholesky(own[:, stays])
            change[stays] = torch.cholesky_solve((own[:, gone] @ theta[gone])[:, None], factor)[:, 0]
        return change.view_as(weight)

    def element_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each weight, ``[R, C]``: ``1/2 w^2 / [F^-1]_kk``, or ``1/2 w^2 F_kk``."""
        ones = torch.eye(weight.numel(), dtype=torch.bool, device=weight.device)
        return self._costs(weight, ones.view(-1, *weight.shape), correlated).view_as(weight)

    def row_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each row with its bias, ``[R]``."""
        rows = torch.arange(weight.shape[0], device=weight.device)[:, None]
        return self.set_costs(weight, "rows", rows, torch.ones_like(rows, dtype=torch.bool), correlated=correlated)

    def column_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each column, ``[C]``."""
        columns = torch.arange(weight.shape[1], device=weight.device)[:, None]
        valid = torch.ones_like(columns, dtype=torch.bool)
        return self.set_costs(weight, "columns", columns, valid, correlated=correlated)

    def set_costs(self, weight: Tensor, axis: Axis, sets: Tensor, valid: Tensor, *, correlated: bool) -> Tensor:
        """Joint cost of sets of rows or columns ``[n, members]`` as far as they are ``valid``: ``[n]``."""
        nothing = torch.zeros_like(weight, dtype=torch.bool)
        removed = []
        for members, meant in zip(sets, valid, strict=True):
            mask = nothing.clone()
            (mask if axis == "rows" else mask.T)[members[meant]] = True
            removed.append(mask)
        return self._costs(weight, removed, correlated)

    def remove_rows_and_columns(self, weight: Tensor, rows: Split, columns: Split, solver: Solver) -> Tensor:
        """Weights of the kept rows and columns after the update, ``[kept rows, kept columns]``.

        All together, structures that died by implication take no part. In groups (``max_correlations``), each group
        changes the weights as if all others stayed, and the changes are added.
        """
        kept = weight[rows.kept][:, columns.kept]
        if solver.max_correlations:
            masks = [
                self._of_rows_and_columns(weight, some_rows, some_columns)
                for some_rows, some_columns in _in_groups(rows.removed, columns.removed, solver.max_correlations)
            ]
            change = sum((self.change(weight, mask) for mask in masks), torch.zeros_like(weight, dtype=torch.float64))
        else:
            alive = torch.zeros_like(weight, dtype=torch.bool)
            there = torch.cat([rows.kept, rows.removed]), torch.cat([columns.kept, columns.removed])
            alive[there[0][:, None], there[1]] = True
            removed = self._of_rows_and_columns(weight, rows.removed, columns.removed) & alive
            change = self.change(weight, removed, alive)
        return (kept + change[rows.kept][:, columns.kept]).to(weight.dtype)

    def remove_elements(self, weight: Tensor, kept: Tensor, solver: Solver) -> Tensor:
        """Weights after the update, ``[R, C]``, zero where ``kept [R, C]`` is False; exact, whatever the steps.

        In groups (``max_correlations``), each group changes the weights as if all others stayed.
        """
        if not solver.max_correlations:
            return (weight + self.change(weight, ~kept)).to(weight.dtype) * kept
        gone = (~kept).flatten().nonzero().flatten()
        updated = weight.double()
        for index, valid in groups((~kept).sum(1), solver.max_correlations):
            for members, meant in zip(index, valid, strict=True):
                mask = torch.zeros_like(kept).flatten()
                mask[gone[members[meant].to(gone.device)]] = True
                updated = updated + self.change(weight, mask.view_as(kept))
        return updated.to(weight.dtype) * kept

    # Cached, as every set of weights asks for them.

    @cached_property
    def _damped(self) -> Tensor:
        return self.damped_matrix()

    @cached_property
    def _inverse(self) -> Tensor:
        return inverse(self._cholesky(self._damped))

    def _cholesky(self, matrix: Tensor) -> Tensor:
        """Lower Cholesky factor of the damped Fisher or of a block of it."""
        if not is_finite(matrix):
            raise NonFiniteError(
                f"The Fisher of {self._name} holds NaN or infinity.",
                "Run with --precision float32, or look for overflowing activations in the model or damaged weights.",
            )
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info):
            raise NotPositiveDefiniteError(
                f"The damped Fisher of {self._name} is not positive definite.",
                "Use more calibration samples, or a larger --dampening-a (inputs) or --dampening-g (gradients).",
            )
        lower: Tensor = factor
        return lower

    def _costs(self, weight: Tensor, removed: Iterable[Tensor], correlated: bool) -> Tensor:
        """Cost of each of several sets of weights, ``[n]``."""
        costs = [self.cost(weight, mask, correlated=correlated) for mask in removed]
        return torch.tensor(costs, dtype=torch.float64, device=weight.device).to(weight.dtype)

    @staticmethod
    def _of_rows_and_columns(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Mask ``[R, C]`` of the weights in some rows or columns."""
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[rows] = True
        mask[:, columns] = True
        return mask


def _in_groups(rows: Tensor, columns: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Groups of neighbouring rows, then of neighbouring columns, as pairs of rows and columns."""
    none = rows[:0]
    # An empty tensor would be split into one empty group.
    by_rows = [(group, none) for group in rows.split(size) if len(group)]
    return by_rows + [(none, group) for group in columns.split(size) if len(group)]
