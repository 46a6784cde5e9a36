"""Sums of two Kronecker products as curvature of a layer: exact costs and updates (paper, appendix I).

Shapes: ``weight [R, C]``, a bias being its last column; ``G1, G2 [R, R]`` and ``A1, A2 [C, C]`` symmetric. The Fisher
of the row-major weights is ``F = kron(G1, A1) + kron(G2, A2)``. The first pair is damped and positive definite; the
second may be indefinite, as what deflation leaves over is.

With ``G1 = L L^T``, ``L^-1 G2 L^-T = E S E^T`` and ``K_G = L^-T E`` one basis diagonalises both factors of a side,
``K_G^T G1 K_G = I`` and ``K_G^T G2 K_G = diag(s_G)``; likewise ``K_A``, ``s_A``. Therefore (eq. 34)

    ``F^-1 = (K_G (x) K_A) diag(1 / (1 + s_G s_A^T)) (K_G (x) K_A)^T``.

The bases are not orthogonal, although the paper says so: ``F`` itself needs ``K^-T = G1 K`` in their place.

Everything is computed in float64, whatever the type of the factors: ``1 + s_G s_A^T`` may come close to zero.
Results have the type of the weight.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_surgeon.errors import NonFiniteError, NotPositiveDefiniteError
from llm_surgeon.mathematics.linalg import ESCALATION, MAX_ESCALATIONS, is_finite

logger = logging.getLogger(__name__)

DTYPE = torch.float64


@dataclass(frozen=True)
class Pencil:
    """The two factors of one side of the sum, and the basis in which both are diagonal.

    Attributes:
        first: Undamped ``G1`` or ``A1``, ``[n, n]``.
        second: ``G2`` or ``A2``, ``[n, n]``.
        damping: Lambda, which is added to the diagonal of ``first`` wherever the damped Fisher is meant.
        basis: K, ``[n, n]``, with ``K^T (first + damping I) K = I``.
        spectrum: s, ``[n]``, with ``K^T second K = diag(s)``.
        name: Name of the factors, for messages.
    """

    first: Tensor
    second: Tensor
    damping: float
    basis: Tensor
    spectrum: Tensor
    name: str

    @classmethod
    def diagonalised(cls, first: Tensor, second: Tensor, damping: float, name: str) -> Pencil:
        """Diagonalise two float64 factors together.

        Raises:
            NotPositiveDefiniteError: If the damped first factor is not positive definite.
        """
        lower, info = torch.linalg.cholesky_ex(_damped(first, damping))
        if int(info) != 0:
            raise NotPositiveDefiniteError(
                f"The curvature factor of {name} is not positive definite with a damping of {damping:g}.",
                "Use more calibration samples, or more damping.",
            )
        whitened = _solve(lower, _solve(lower, second).T)
        spectrum, vectors = torch.linalg.eigh(whitened)
        basis = torch.linalg.solve_triangular(lower.T, vectors, upper=True)
        return cls(first, second, damping, basis, spectrum, name)

    def restricted(self, index: Tensor) -> Pencil:
        """The pencil of the principal blocks at distinct positions ``index [k]``, with the same damping.

        Raises:
            NotPositiveDefiniteError: If rounding makes the block of the first factor indefinite.
        """
        first, second = _block(self.first, index, index), _block(self.second, index, index)
        if len(index) == len(self.spectrum):
            # A mere reordering, which needs no new decomposition.
            return Pencil(first, second, self.damping, self.basis[index], self.spectrum, self.name)
        return Pencil.diagonalised(first, second, self.damping, self.name)

    def coordinates(self, x: Tensor) -> Tensor:
        """Coordinates ``x K^-T`` of ``x [m, n]``; K is not orthogonal, so ``K^-T = (first + damping I) K``."""
        return (x @ self.first + self.damping * x) @ self.basis


@dataclass(frozen=True)
class KroneckerSum:
    """The Fisher ``F = kron(G1, A1) + kron(G2, A2)`` of one layer, positive definite; built by ``kronecker_sum``.

    OBS costs, updates, ``apply`` and ``diagonal`` are of the damped F throughout. A single Kronecker product lets the
    numerator of a cost keep its undamped factor (``costs.py``); a sum does not come apart into such factors, so here
    the numerators are damped too. Independent (OBD) costs need no inverse and are of the undamped F.

    Costs are in nats of the loss that the factors were taken of. Work is cubic in R and C, never in their product.

    Attributes:
        gradients: ``G1`` and ``G2``.
        inputs: ``A1`` and ``A2``.
    """

    gradients: Pencil
    inputs: Pencil

    def element_costs(self, weight: Tensor) -> Tensor:
        """OBS cost of each weight: ``1/2 W_rc^2 / [F^-1]_rc,rc`` (paper, eq. 35 for one weight).

        The diagonal of ``F^-1`` is ``(K_G o K_G) (1 / (1 + s_G s_A^T)) (K_A o K_A)^T``.

        Args:
            weight: ``[R, C]``.

        Returns:
            ``[R, C]``.
        """
        inverse_diagonal = self.gradients.basis.square() @ (1 / self._eigenvalues()) @ self.inputs.basis.square().T
        return (0.5 * weight.to(DTYPE).square() / inverse_diagonal).to(weight.dtype)

    def row_costs(self, weight: Tensor) -> Tensor:
        """OBS cost of each row: ``1/2 sum_j (W K_A^-T)_rj^2 / d_rj`` (paper, eq. 35 for one row).

        Removing row r constrains C weights. With ``E = e_r^T (x) I`` the general cost
        ``1/2 (E w)^T (E F^-1 E^T)^-1 E w`` has ``E F^-1 E^T = K_A diag(d_r) K_A^T``, where
        ``d_rj = sum_i K_G[r, i]^2 / (1 + s_G[i] s_A[j])``.

        Args:
            weight: ``[R, C]``.

        Returns:
            ``[R]``.
        """
        d = self.gradients.basis.square() @ (1 / self._eigenvalues())
        return (0.5 * (self.inputs.coordinates(weight.to(DTYPE)).square() / d).sum(1)).to(weight.dtype)

    def column_costs(self, weight: Tensor) -> Tensor:
        """OBS cost of each column, ``[C]``: the mirror image of ``row_costs``."""
        return self._mirrored().row_costs(weight.T)

    def independent_element_costs(self, weight: Tensor) -> Tensor:
        """OBD cost of each weight: ``1/2 W_rc^2 F_rc,rc``, undamped, ``[R, C]``.

        Like all OBD costs here, it is negative where the undamped sum is.
        """
        return (0.5 * weight.to(DTYPE).square() * self._undamped_diagonal()).to(weight.dtype)

    def independent_row_costs(self, weight: Tensor) -> Tensor:
        """OBD cost of each row: ``1/2 sum_t [G_t]_rr w_r^T A_t w_r`` over both terms t, undamped.

        Args:
            weight: ``[R, C]``.

        Returns:
            ``[R]``.
        """
        w = weight.to(DTYPE)
        first = self.gradients.first.diagonal() * ((w @ self.inputs.first) * w).sum(1)
        second = self.gradients.second.diagonal() * ((w @ self.inputs.second) * w).sum(1)
        return (0.5 * (first + second)).to(weight.dtype)

    def independent_column_costs(self, weight: Tensor) -> Tensor:
        """OBD cost of each column, ``[C]``: the mirror image of ``independent_row_costs``."""
        return self._mirrored().independent_row_costs(weight.T)

    def remove_rows(self, weight: Tensor, removed: Tensor, kept: Tensor) -> Tensor:
        """Kept rows ``[K, C]`` after the removal of rows R', exact for the whole set (paper, eq. 36).

        In the coordinates ``W~ = W K_A^-T`` the Fisher is block diagonal over the columns j, with the blocks
        ``H_j = G1 + s_A[j] G2``. Minimising over the kept rows K changes them by ``[H_j]_KK^-1 [H_j]_KR' w~_R'j``,
        and one basis, that of the kept blocks of ``G1`` and ``G2``, diagonalises ``[H_j]_KK`` for every j.

        Rows that are neither removed nor kept take no part, as in ``updates.py``. All columns do.

        Args:
            weight: ``[R, C]``.
            removed: Rows to compensate for.
            kept: Rows that stay, in the order wanted.

        Raises:
            NotPositiveDefiniteError: If rounding makes the kept block indefinite.
        """
        if not len(removed) or not len(kept):
            return weight[kept]
        return self._remove_rows(weight, removed, kept, self.gradients.restricted(kept))

    def remove_columns(self, weight: Tensor, removed: Tensor, kept: Tensor) -> Tensor:
        """Kept columns ``[R, M]`` after the removal of columns C': the mirror image of ``remove_rows``."""
        return self._mirrored().remove_rows(weight.T, removed, kept).T

    def remove_structures(
        self, weight: Tensor, rows_removed: Tensor, rows_kept: Tensor, columns_removed: Tensor, columns_kept: Tensor
    ) -> Tensor:
        """Kept rows and columns ``[K, M]`` after a joint removal of rows and columns: the exact joint minimiser.

        Rows go first. At their minimum the quadratic has no slope in the kept rows, so what is left is a problem of
        the kept rows alone, ``kron([G1]_KK, A1) + kron([G2]_KK, A2)``, with the updated weights: the column step must
        use these blocks. (For a single product the G side cancels, which is why ``updates.py`` need not.)

        Rows and columns that are neither removed nor kept take no part in either step.

        Args:
            weight: ``[R, C]``.
            rows_removed: Rows to compensate for.
            rows_kept: Rows that stay, in the order wanted.
            columns_removed: Columns to compensate for.
            columns_kept: Columns that stay, in the order wanted.

        Returns:
            ``[K, M]``.

        Raises:
            NotPositiveDefiniteError: If rounding makes a block of a first factor indefinite.
        """
        nothing_removed = not len(rows_removed) and not len(columns_removed)
        if nothing_removed or not len(rows_kept) or not len(columns_kept):
            return weight[rows_kept][:, columns_kept]
        # Dead columns would otherwise be free to move in the row step, and pull the others along.
        alive = torch.cat([columns_removed, columns_kept])
        inputs, gradients = self.inputs.restricted(alive), self.gradients.restricted(rows_kept)
        live = KroneckerSum(self.gradients, inputs)
        updated = live._remove_rows(weight[:, alive], rows_removed, rows_kept, gradients)
        position = torch.arange(len(alive), device=alive.device)
        removed, kept = position.split([len(columns_removed), len(columns_kept)])
        return KroneckerSum(gradients, inputs).remove_columns(updated, removed, kept)

    def apply(self, x: Tensor) -> Tensor:
        """Apply the Fisher: ``F vec(x)`` as a matrix, ``G1 x A1 + G2 x A2`` with the damped first pair.

        Args:
            x: ``[R, C]``; a solver had better hold it in float64.

        Returns:
            ``[R, C]``.
        """
        wide = x.to(DTYPE)
        left = self.gradients.first @ wide + self.gradients.damping * wide
        first = left @ self.inputs.first + self.inputs.damping * left
        return (first + self.gradients.second @ wide @ self.inputs.second).to(x.dtype)

    def diagonal(self) -> Tensor:
        """The diagonal of the damped F, ``[R, C]`` in float64; positive."""
        g, a = self.gradients, self.inputs
        first = torch.outer(g.first.diagonal() + g.damping, a.first.diagonal() + a.damping)
        return first + torch.outer(g.second.diagonal(), a.second.diagonal())

    def _undamped_diagonal(self) -> Tensor:
        g, a = self.gradients, self.inputs
        return torch.outer(g.first.diagonal(), a.first.diagonal()) + torch.outer(
            g.second.diagonal(), a.second.diagonal()
        )

    def _mirrored(self) -> KroneckerSum:
        """The Fisher of the transposed weight."""
        return KroneckerSum(self.inputs, self.gradients)

    def _eigenvalues(self) -> Tensor:
        """Eigenvalues of F in the basis ``K_G (x) K_A``, ``[R, C]``."""
        return 1 + torch.outer(self.gradients.spectrum, self.inputs.spectrum)

    def _remove_rows(self, weight: Tensor, removed: Tensor, kept: Tensor, block: Pencil) -> Tensor:
        """Remove rows as ``remove_rows`` does, with the pencil of the kept rows at hand."""
        gone = self.inputs.coordinates(weight[removed].to(DTYPE))
        cross = _block(self.gradients.first, kept, removed) @ gone
        cross += (_block(self.gradients.second, kept, removed) @ gone) * self.inputs.spectrum
        eigenvalues = 1 + torch.outer(block.spectrum, self.inputs.spectrum)
        change = block.basis @ ((block.basis.T @ cross) / eigenvalues) @ self.inputs.basis.T
        return (weight[kept].to(DTYPE) + change).to(weight.dtype)


def kronecker_sum(
    first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], damping_g: float, damping_a: float, name: str
) -> KroneckerSum:
    """Decompose ``kron(G1 + damping_g I, A1 + damping_a I) + kron(G2, A2)``, if need be with more damping.

    The sum is positive definite if and only if the damped ``G1`` and ``A1`` are and ``1 + s_G[i] s_A[j] > 0`` for
    all i and j. Both dampings grow tenfold until that holds: it shrinks both spectra.

    Args:
        first: Undamped ``G1 [R, R]`` and ``A1 [C, C]``, symmetric, positive definite once damped.
        second: ``G2 [R, R]`` and ``A2 [C, C]``, symmetric.
        damping_g: Lambda, which is added to the diagonal of ``G1``.
        damping_a: Lambda, which is added to the diagonal of ``A1``.
        name: Name of the layer, for messages.

    Raises:
        NonFiniteError: If a factor holds NaN or infinity.
        NotPositiveDefiniteError: If ``MAX_ESCALATIONS`` tenfold increases of the dampings do not help.
    """
    if not all(is_finite(factor) for factor in (*first, *second)):
        raise NonFiniteError(
            f"A curvature factor of {name} holds NaN or infinity.",
            "Run with --precision float32, or look for overflowing activations in the model or damaged weights.",
        )
    (g1, a1), (g2, a2) = [(g.to(DTYPE), a.to(DTYPE)) for g, a in (first, second)]
    for escalation in range(MAX_ESCALATIONS + 1):
        level_g, level_a = (damping * ESCALATION**escalation for damping in (damping_g, damping_a))
        try:
            gradients = Pencil.diagonalised(g1, g2, level_g, f"{name} (gradients)")
            inputs = Pencil.diagonalised(a1, a2, level_a, f"{name} (inputs)")
        except NotPositiveDefiniteError:
            continue
        if _is_positive(gradients.spectrum, inputs.spectrum):
            if escalation:
                message = "%s needed dampings of %g (gradients) and %g (inputs) instead of %g and %g"
                logger.warning(message, name, level_g, level_a, damping_g, damping_a)
            return KroneckerSum(gradients, inputs)
    raise NotPositiveDefiniteError(
        f"The sum of two Kronecker products of {name} is not positive definite with dampings of {level_g:g} "
        f"(gradients) and {level_a:g} (inputs).",
        "Use more calibration samples, or a larger --dampening-a (inputs) or --dampening-g (gradients).",
    )


def kronecker_sum_bytes(rows: int, columns: int, element_size: int) -> int:
    """Bytes at the peak of ``kronecker_sum`` and of every method of its result, for one layer.

    Args:
        rows: R.
        columns: C.
        element_size: Bytes of one element of the four factors given, which stay beside their float64 copies.
    """
    squares = rows**2 + columns**2
    given = 2 * squares * element_size
    # Two factors and a basis on each side; for an update as much again of the blocks that stay.
    held = 2 * 3 * squares
    # One decomposition at a time, eigenvectors and their workspace included, or products with the weight.
    workspace = 7 * max(rows, columns) ** 2 + 6 * rows * columns
    return given + (held + workspace) * DTYPE.itemsize


def _is_positive(spectrum_g: Tensor, spectrum_a: Tensor) -> bool:
    """Tell whether ``1 + s_G s_A^T`` is positive throughout, by more than the rounding of its spectra."""
    products = torch.outer(spectrum_g, spectrum_a)
    return bool((1 + products > torch.finfo(DTYPE).eps * products.norm()).all())


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    """Solve ``L Y = X`` for a lower triangular ``L``."""
    result: Tensor = torch.linalg.solve_triangular(lower, right, upper=False)
    return result


def _damped(matrix: Tensor, damping: float) -> Tensor:
    result = matrix.clone()
    result.diagonal().add_(damping)
    return result


def _block(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return matrix[rows][:, columns]
