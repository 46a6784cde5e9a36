"""Approximations of one layer's Fisher behind one interface: the costs of removals, and the updates after them.

An approximation knows tensors and dampings, neither models nor how its factors were estimated.

Shapes: ``weight [R, C]``, a bias being its last column. ``correlated`` chooses optimal brain surgeon (True), which
knows how the other weights could make up for a loss, or optimal brain damage (False), which does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from llm_surgeon.mathematics.costs import column_costs, element_costs, row_costs, row_set_costs
from llm_surgeon.mathematics.keep_masks import Axis
from llm_surgeon.mathematics.kronecker_sum import kronecker_sum
from llm_surgeon.mathematics.linalg import damped_cholesky, damping_of, inverse, inverse_diagonal
from llm_surgeon.mathematics.updates import (
    remove_columns,
    remove_elements,
    remove_elements_independently,
    remove_rows,
    remove_rows_independently,
)
from llm_surgeon.stopwatch import timed


@dataclass(frozen=True)
class Damping:
    """Damping of the input factor and of the gradient factor, as fractions of the mean of their diagonals."""

    a: float
    g: float


@dataclass(frozen=True)
class Split:
    """Positions of kept rows or columns, and of removed ones to compensate for; all others died by implication."""

    kept: Tensor
    removed: Tensor


@dataclass(frozen=True)
class Solver:
    """Options of the computation of an update.

    Attributes:
        max_correlations: Structures in a group that know of one another, at most; 0 takes all together.
        steps: Steps of conjugate gradients for single weights, at most.
        tolerance: Fraction of the first residual at which they stop.
    """

    max_correlations: int = 0
    steps: int = 20
    tolerance: float = 1e-2


class Fisher(Protocol):
    """An approximation of one layer's Fisher: the interface of costs and updates.

    A new one may inherit from ``dense_fisher.DenseFisher``, which has all operations, and override what it does faster.
    """

    def element_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each weight, ``[R, C]``."""

    def row_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each row, ``[R]``."""

    def column_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each column, ``[C]``."""

    def set_costs(self, weight: Tensor, axis: Axis, sets: Tensor, valid: Tensor, *, correlated: bool) -> Tensor:
        """Joint cost of sets of rows or columns ``[n, members]`` as far as they are ``valid``: ``[n]``."""

    def remove_rows_and_columns(self, weight: Tensor, rows: Split, columns: Split, solver: Solver) -> Tensor:
        """Weights of the kept rows and columns after the update, ``[kept rows, kept columns]``."""

    def remove_elements(self, weight: Tensor, kept: Tensor, solver: Solver) -> Tensor:
        """Weights after the update, ``[R, C]``, zero where ``kept [R, C]`` is False."""


class KroneckerProduct:
    """One Kronecker product ``F = G (x) A``; a factor that is None is the identity (paper, section 3.1).

    Args:
        g: Undamped gradient factor ``[R, R]``.
        a: Undamped input factor ``[C, C]``.
        damping: Added where a factor is inverted.
        name: The layer, for messages.
    """

    def __init__(self, g: Tensor | None, a: Tensor | None, damping: Damping, name: str) -> None:
        self._g = _Factor(g, damping.g, f"{name} (gradients)")
        self._a = _Factor(a, damping.a, f"{name} (inputs)")
        self._name = name

    def element_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each weight, ``1/2 w^2 / ([G^-1]_rr [A^-1]_cc)``, or ``1/2 w^2 G_rr A_cc``."""
        rows = self._g.inverse_diagonal(weight.shape[0], weight, correlated)
        columns = self._a.inverse_diagonal(weight.shape[1], weight, correlated)
        return element_costs(weight, rows[:, None] * columns)

    def row_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each row, ``1/2 w_r^T A w_r / [G^-1]_rr``, or times ``G_rr``."""
        return row_costs(weight, self._a.matrix, self._g.inverse_diagonal(weight.shape[0], weight, correlated))

    def column_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each column, ``1/2 w_c^T G w_c / [A^-1]_cc``, or times ``A_cc``."""
        return column_costs(weight, self._g.matrix, self._a.inverse_diagonal(weight.shape[1], weight, correlated))

    def set_costs(self, weight: Tensor, axis: Axis, sets: Tensor, valid: Tensor, *, correlated: bool) -> Tensor:
        """Joint cost, ``1/2 tr([G^-1]_SS^-1 W_S A W_S^T)`` for rows, and its mirror image for columns."""
        own, other = (self._g, self._a) if axis == "rows" else (self._a, self._g)
        weight = weight if axis == "rows" else weight.T
        if sets.shape[1] == 1:
            single = row_costs(weight, other.matrix, own.inverse_diagonal(len(weight), weight, correlated))
            return single[sets[:, 0]] * valid[:, 0]
        inverse = own.inverse(len(weight), weight) if correlated else None
        return row_set_costs(weight, other.matrix, own.matrix, inverse, sets, valid, own.name)

    def remove_rows_and_columns(self, weight: Tensor, rows: Split, columns: Split, solver: Solver) -> Tensor:
        """Update for rows, then for columns, which is exact; with groups, the sum of each group's own change."""
        if not solver.max_correlations:
            return self._a.remove_columns(self._g.remove_rows(weight, rows), columns)
        size, kept = solver.max_correlations, weight[rows.kept][:, columns.kept]
        by_rows = self._g.change_of_rows(weight[:, columns.kept], rows, size)
        by_columns = self._a.change_of_rows(weight[rows.kept].T, columns, size).T
        return kept + by_rows + by_columns

    def remove_elements(self, weight: Tensor, kept: Tensor, solver: Solver) -> Tensor:
        """Update for all weights together by conjugate gradients, or for groups that do not know of one another."""
        if solver.max_correlations:
            g_inverse, a_inverse = self._g.inverse(weight.shape[0], weight), self._a.inverse(weight.shape[1], weight)
            return remove_elements_independently(
                weight, kept, g_inverse, a_inverse, solver.max_correlations, self._name
            )
        g, a = self._g.damped(), self._a.damped()

        def fisher(change: Tensor) -> Tensor:
            left = change if g is None else g @ change
            return left if a is None else left @ a

        diagonal = self._g.damped_diagonal(weight.shape[0], weight)[:, None] * self._a.damped_diagonal(
            weight.shape[1], weight
        )
        return remove_elements(weight, kept, fisher, diagonal, steps=solver.steps, tolerance=solver.tolerance)


class SumOfTwo:
    """A sum of two Kronecker products, ``F = G1 (x) A1 + G2 (x) A2`` (paper, appendix I); see ``kronecker_sum.py``.

    Its costs damp the numerators too, unlike those of one Kronecker product.

    Args:
        first: Undamped ``(G1 [R, R], A1 [C, C])``.
        second: ``(G2, A2)``, which may be indefinite.
        damping: Damping of the first pair, as fractions of the mean of their diagonals.
        name: The layer, for messages.
    """

    def __init__(
        self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], damping: Damping, name: str
    ) -> None:
        g, a = first
        self._sum = kronecker_sum(first, second, damping_of(g, damping.g), damping_of(a, damping.a), name)

    def element_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each weight, ``[R, C]``; see ``KroneckerSum``."""
        return self._sum.element_costs(weight) if correlated else _no_gain(self._sum.independent_element_costs(weight))

    def row_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each row, ``[R]``."""
        return self._sum.row_costs(weight) if correlated else _no_gain(self._sum.independent_row_costs(weight))

    def column_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each column, ``[C]``."""
        return self._sum.column_costs(weight) if correlated else _no_gain(self._sum.independent_column_costs(weight))

    def set_costs(self, weight: Tensor, axis: Axis, sets: Tensor, valid: Tensor, *, correlated: bool) -> Tensor:
        """Cost of sets of one member, ``[n]``; a recipe that needs larger ones is refused before the run."""
        assert sets.shape[1] == 1
        costs = self.row_costs if axis == "rows" else self.column_costs
        return costs(weight, correlated=correlated)[sets[:, 0]] * valid[:, 0]

    def remove_rows_and_columns(self, weight: Tensor, rows: Split, columns: Split, solver: Solver) -> Tensor:
        """Exact update for all rows and columns together; a recipe with groups is refused before the run."""
        return self._sum.remove_structures(weight, rows.removed, rows.kept, columns.removed, columns.kept)

    def remove_elements(self, weight: Tensor, kept: Tensor, solver: Solver) -> Tensor:
        """Update for all weights together by conjugate gradients, in float64."""
        exact = remove_elements(
            weight.double(),
            kept,
            self._sum.apply,
            self._sum.diagonal(),
            steps=solver.steps,
            tolerance=solver.tolerance,
        )
        return exact.to(weight.dtype)


def _no_gain(costs: Tensor) -> Tensor:
    """Raise negative costs to zero: where the undamped sum is indefinite, removing a weight still gains nothing."""
    return costs.clamp(min=0)


class Diagonal:
    """The exact diagonal of the Fisher, ``F = diag(D)``: for independent costs only.

    Args:
        diagonal: ``[R, C]``.
    """

    def __init__(self, diagonal: Tensor) -> None:
        self._diagonal = diagonal

    def element_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each weight, ``1/2 w^2 D`` (paper, eq. 18)."""
        return element_costs(weight, 1 / self._diagonal)

    def row_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each row, ``[R]``: the sum over its weights, which are independent."""
        return self.element_costs(weight, correlated=correlated).sum(1)

    def column_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Cost of each column, ``[C]``: the sum over its weights."""
        return self.element_costs(weight, correlated=correlated).sum(0)

    def set_costs(self, weight: Tensor, axis: Axis, sets: Tensor, valid: Tensor, *, correlated: bool) -> Tensor:
        """Joint cost of each set, ``[n]``: the sum over its members, which are independent."""
        costs = self.row_costs if axis == "rows" else self.column_costs
        return (costs(weight, correlated=correlated)[sets] * valid).sum(1)

    def remove_rows_and_columns(self, weight: Tensor, rows: Split, columns: Split, solver: Solver) -> Tensor:
        """Weights of the kept rows and columns, unchanged: independent weights do not make up for one another."""
        return weight[rows.kept][:, columns.kept]

    def remove_elements(self, weight: Tensor, kept: Tensor, solver: Solver) -> Tensor:
        """Weights with the removed ones at zero: independent weights do not make up for one another."""
        return weight * kept


@dataclass(frozen=True)
class _Factor:
    """One factor of a Kronecker product with its damping; None is the identity, which needs none."""

    matrix: Tensor | None
    fraction: float
    name: str

    @property
    def damping(self) -> float:
        """Lambda, which is added to the diagonal; zero for the identity."""
        return 0.0 if self.matrix is None else damping_of(self.matrix, self.fraction)

    def damped(self) -> Tensor | None:
        """The matrix with lambda added to its diagonal; None for the identity."""
        if self.matrix is None:
            return None
        damped = self.matrix.clone()
        damped.diagonal().add_(self.damping)
        return damped

    def damped_diagonal(self, size: int, like: Tensor) -> Tensor:
        """Diagonal of the damped factor, ``[size]``."""
        return like.new_ones(size) if self.matrix is None else self.matrix.diagonal() + self.damping

    def inverse_diagonal(self, size: int, like: Tensor, correlated: bool) -> Tensor:
        """Diagonal of the damped inverse, or the inverse of the undamped diagonal where all is independent."""
        if self.matrix is None:
            return like.new_ones(size)
        return self._inverse_diagonal if correlated else 1 / self.matrix.diagonal()

    def inverse(self, size: int, like: Tensor) -> Tensor:
        """The damped inverse, ``[size, size]``."""
        if self.matrix is None:
            return torch.eye(size, dtype=like.dtype, device=like.device)
        return self._inverse

    # Cached, as several structures of a layer may ask for the same decomposition.

    @cached_property
    def _cholesky(self) -> Tensor:
        assert self.matrix is not None
        with timed("decomposition"):
            return damped_cholesky(self.matrix, self.damping, self.name)

    @cached_property
    def _inverse_diagonal(self) -> Tensor:
        lower = self._cholesky
        with timed("decomposition"):
            return inverse_diagonal(lower)

    @cached_property
    def _inverse(self) -> Tensor:
        lower = self._cholesky
        with timed("decomposition"):
            return inverse(lower)

    def remove_rows(self, weight: Tensor, split: Split) -> Tensor:
        """Kept rows after an exact update; with the identity they do not change."""
        if self.matrix is None:
            return weight[split.kept]
        return remove_rows(weight, self.matrix, split.removed, split.kept, self.damping, self.name)

    def remove_columns(self, weight: Tensor, split: Split) -> Tensor:
        """Kept columns after an exact update; with the identity they do not change."""
        if self.matrix is None:
            return weight[:, split.kept]
        return remove_columns(weight, self.matrix, split.removed, split.kept, self.damping, self.name)

    def change_of_rows(self, weight: Tensor, split: Split, size: int) -> Tensor:
        """Change of the kept rows ``[kept, C]`` when groups of ``size`` removed rows are independent."""
        if self.matrix is None or not len(split.removed) or not len(split.kept):
            return torch.zeros_like(weight[split.kept])
        g_inverse = self.inverse(weight.shape[0], weight)
        return remove_rows_independently(weight, g_inverse, split.removed, split.kept, size, self.name)
