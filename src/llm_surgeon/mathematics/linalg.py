"""Linear algebra of symmetric matrices: damped Cholesky decompositions that escalate, inverses, quadratic forms.

Pure functions of tensors. A matrix has a name only for messages.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from llm_surgeon.errors import NonFiniteError, NotPositiveDefiniteError

logger = logging.getLogger(__name__)

# Each escalation multiplies the damping by ten: 0.01 of the mean diagonal ends at 100 times that mean.
ESCALATION = 10.0
MAX_ESCALATIONS = 4
# The scale of a factor that is zero throughout, as of inputs that are never active or of outputs without effect. Its
# structures have to cost next to nothing, and the product of two inverses has to stay within float32.
NOTHING = 1e-15


def damping_of(matrix: Tensor, fraction: float) -> float:
    """Damping lambda of a factor: ``fraction`` of the mean of its diagonal."""
    return fraction * (float(matrix.diagonal().mean()) or NOTHING)


def is_finite(tensor: Tensor) -> bool:
    """Tell whether no element is NaN or infinite, in one pass without a temporary unless the sum itself overflows."""
    total = tensor.sum(dtype=torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else None)
    # A sum is finite only if every term is, but large terms may make an infinite sum.
    return bool(total.isfinite()) or bool(tensor.isfinite().all())


def damped_cholesky(matrix: Tensor, damping: float, name: str) -> Tensor:
    """Lower Cholesky factor of a damped factor; tried as it is, in float64, and with more damping and a warning.

    Args:
        matrix: Symmetric ``[n, n]``.
        damping: Lambda, which is added to the diagonal.
        name: Name of the matrix, for messages.

    Returns:
        Lower triangular ``[n, n]`` in the type of ``matrix``.

    Raises:
        NonFiniteError: If the matrix holds NaN or infinity.
        NotPositiveDefiniteError: If ``MAX_ESCALATIONS`` tenfold increases of the damping do not help.
    """
    if not is_finite(matrix):
        raise NonFiniteError(
            f"The curvature factor of {name} holds NaN or infinity.",
            "Run with --precision float32, or look for overflowing activations in the model or damaged weights.",
        )
    for escalation in range(MAX_ESCALATIONS + 1):
        level = damping * ESCALATION**escalation
        for dtype in (matrix.dtype, torch.float64):
            candidate = matrix.to(dtype, copy=True)
            candidate.diagonal().add_(level)
            factor, info = torch.linalg.cholesky_ex(candidate)
            if int(info) == 0:
                if escalation:
                    logger.warning("%s needed a damping of %g instead of %g", name, level, damping)
                lower: Tensor = factor.to(matrix.dtype)
                return lower
    raise NotPositiveDefiniteError(
        f"The curvature factor of {name} is not positive definite with a damping of {level:g}.",
        "Use more calibration samples, or a larger --dampening-a (inputs) or --dampening-g (gradients).",
    )


def inverse(cholesky: Tensor) -> Tensor:
    """Inverse ``(L L^T)^-1 [n, n]`` from the lower factor ``L [n, n]``."""
    result: Tensor = torch.cholesky_inverse(cholesky)
    return result


def inverse_diagonal(cholesky: Tensor) -> Tensor:
    """Diagonal ``[n]`` of ``(L L^T)^-1`` from the lower factor ``L [n, n]``: the squared columns of ``L^-1``, summed.

    It takes a third of the work of the whole inverse.
    """
    return triangular_inverse(cholesky).square_().sum(0)


def triangular_inverse(lower: Tensor) -> Tensor:
    """Inverse ``L^-1`` of a lower triangular ``L``, both ``[n, n]``.

    By halves, ``[[P, 0], [Q, R]]^-1 = [[P^-1, 0], [-R^-1 Q P^-1, R^-1]]``, so that nearly all of the work is products
    of matrices. LAPACK's routine is not within reach, and solving for the identity does three times the work.
    """
    inverted = torch.zeros_like(lower)
    _invert_into(lower, inverted)
    return inverted


# Size at which halving stops; between 64 and 200 it makes no difference.
_SMALL = 128


def _invert_into(lower: Tensor, inverted: Tensor) -> None:
    size = len(lower)
    if size <= _SMALL:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        inverted.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = size // 2
    head, tail = slice(0, half), slice(half, size)
    _invert_into(lower[head, head], inverted[head, head])
    _invert_into(lower[tail, tail], inverted[tail, tail])
    inverted[tail, head] = _times_lower(_lower_times(inverted[tail, tail], lower[tail, head]), inverted[head, head])
    inverted[tail, head].neg_()


def _lower_times(lower: Tensor, matrix: Tensor) -> Tensor:
    """Product ``L M`` of a lower triangular ``L``, without the quarter of ``L`` that is zero."""
    half = len(lower) // 2
    return torch.cat([lower[:half, :half] @ matrix[:half], lower[half:] @ matrix])


def _times_lower(matrix: Tensor, lower: Tensor) -> Tensor:
    """Product ``M L`` of a lower triangular ``L``, without the quarter of ``L`` that is zero."""
    half = len(lower) // 2
    return torch.cat([matrix @ lower[:, :half], matrix[:, half:] @ lower[half:, half:]], 1)


# Strips that a symmetric matrix is cut into, to read one half of it only; with eight, 9 of 16 parts of it are read.
_STRIPS = 8


def quadratic_forms(vectors: Tensor, symmetric: Tensor) -> Tensor:
    """Quadratic forms ``x^T M x [n]`` of each row x of ``vectors [n, size]`` with a symmetric ``M [size, size]``.

    Elements beside the diagonal count twice, so that little more than half of ``M`` is multiplied with.
    """
    total, size = vectors.new_zeros(len(vectors)), len(symmetric)
    height = max(1, -(-size // _STRIPS))
    for start in range(0, size, height):
        strip, rest = slice(start, start + height), slice(start + height, size)
        own = vectors[:, strip]
        product = own @ symmetric[strip, strip]
        product.addmm_(vectors[:, rest], symmetric[rest, strip], alpha=2)
        total += torch.linalg.vecdot(product, own)
    return total


def batched_solve(systems: Tensor, right: Tensor, name: str) -> Tensor:
    """Solve many small symmetric positive definite systems, in float64 if their own type fails.

    Args:
        systems: ``[groups, n, n]``.
        right: ``[groups, n, k]``.
        name: Name of the layer or factor that they come from, for messages.

    Returns:
        ``[groups, n, k]``.

    Raises:
        NotPositiveDefiniteError: If one of them has no Cholesky decomposition.
    """
    for dtype in (systems.dtype, torch.float64):
        factors, info = torch.linalg.cholesky_ex(systems.to(dtype))
        if not bool(info.any()):
            return torch.cholesky_solve(right.to(dtype), factors).to(right.dtype)
    raise NotPositiveDefiniteError(
        f"The correlations of what is removed together in {name} are not positive definite.",
        "Use a larger --dampening-a (inputs) or --dampening-g (gradients), or --max-correlations 0.",
    )
