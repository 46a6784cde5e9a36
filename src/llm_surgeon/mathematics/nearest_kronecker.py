"""Nearest sums of Kronecker products to the Fisher, by power iteration on samples (paper, appendix I, Alg. 4).

Shapes: per position n an input ``a_n [C]`` and an output gradient ``g_n [R]``, so that the exact Fisher of the
row-major weights is ``F = mean_n kron(g_n g_n^T, a_n a_n^T)``. The nearest ``kron(G, A)`` in the Frobenius norm is the
nearest matrix of rank one to the rearranged ``R(F) = mean_n vec(g_n g_n^T) vec(a_n a_n^T)^T`` (eq. 32; Golub & Van
Loan 2013), whose singular vectors a power iteration finds without forming it. Further terms follow by deflation.

One iteration is two half steps. Each is a sum over positions, so batches may be streamed:

    ``total = sum over batches of gradient_half_step(a, g, A)``
    ``G, _ = finished_half_step(total, positions, A, earlier)``
    ``total = sum over batches of input_half_step(a, g, G)``
    ``A, sigma = finished_half_step(total, positions, G, [(A_r, G_r) for G_r, A_r in earlier])``

and, after the last iteration, ``balanced_pair(G, A, sigma)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

# Elements of one block of the Gram matrix of the samples, 32 MiB in float64.
GRAM_ELEMENTS = 2**22


def gradient_half_step(a: Tensor, g: Tensor, input_factor: Tensor) -> Tensor:
    """Part of a batch in ``R(F) vec(A)``: ``sum_n (a_n^T A a_n) g_n g_n^T`` (paper, Alg. 4).

    Args:
        a: Inputs ``[n, C]``.
        g: Output gradients ``[n, R]``.
        input_factor: A, ``[C, C]``; the sum is taken in its type.

    Returns:
        ``[R, R]``, to be added over batches.
    """
    a, g = a.to(input_factor.dtype), g.to(input_factor.dtype)
    return (g * _quadratic_forms(a, input_factor)[:, None]).T @ g


def input_half_step(a: Tensor, g: Tensor, gradient_factor: Tensor) -> Tensor:
    """Part of a batch in ``R(F)^T vec(G)``: ``sum_n (g_n^T G g_n) a_n a_n^T [C, C]``; see ``gradient_half_step``."""
    return gradient_half_step(g, a, gradient_factor)


def finished_half_step(
    total: Tensor, positions: float, opposite: Tensor, earlier: Sequence[Pair]
) -> tuple[Tensor, float]:
    """Mean, deflation and normalisation of a half step.

    ``R(F - sum_r G_r (x) A_r) vec(A) = R(F) vec(A) - sum_r <A_r, A> vec(G_r)``, and the transpose for the other side.

    Args:
        total: Sum over all positions of a half step, ``[n, n]``.
        positions: Number of positions in that sum.
        opposite: The factor that the half step was taken with.
        earlier: The terms found before, each as a pair of the factor on the side of ``total`` and the one on the side
            of ``opposite``.

    Returns:
        The factor with Frobenius norm 1 (0 if nothing is left of F) and its norm before.
    """
    # The two triangles of a half step differ in rounding.
    mean = (total + total.T) / (2 * positions)
    for same, other in earlier:
        mean = mean - (other * opposite).sum() * same
    # In float64, as squares of squares of gradients underflow.
    norm = float(torch.linalg.vector_norm(mean, dtype=torch.float64))
    return (mean / norm if norm else mean), norm


def balanced_pair(gradient_factor: Tensor, input_factor: Tensor, sigma: float) -> Pair:
    """Balance a pair: ``sqrt(sigma) G``, ``sqrt(sigma) A``, signed so that A has a trace of at least 0 (paper, Alg. 4).

    Sigma is the norm of the last half step before its normalisation. (Alg. 4 as printed takes it afterwards, where it
    is always 1.)

    Args:
        gradient_factor: G, ``[R, R]``, of Frobenius norm 1.
        input_factor: A, ``[C, C]``, of Frobenius norm 1.
        sigma: The singular value of ``R(F)`` that belongs to them.
    """
    scale = math.copysign(math.sqrt(sigma), float(input_factor.trace()))
    return scale * gradient_factor, scale * input_factor


def nearest_kronecker_sum(
    a: Tensor, g: Tensor, terms: int, iterations: int, start: Sequence[Pair] | None = None
) -> list[Pair]:
    """Nearest sum of Kronecker products to the Fisher of samples in memory (paper, eq. 31 and Alg. 4).

    Power iteration starts from ``A = I``: it weights each position by ``|a_n|^2``, so the first term begins and stays
    positive semi-definite, however the inputs are rotated. The paper's vector of ones, ``A = 1 1^T``, weights
    by the square of the sum of ``a_n`` instead, which is blind to inputs that cancel.

    Args:
        a: Inputs ``[n, C]``.
        g: Output gradients ``[n, R]``, of the type of ``a``.
        terms: Number of products.
        iterations: Power iterations for each, at least 1.
        start: Terms of an earlier call; the first terms start from their A instead of ``I``.

    Returns:
        Pairs ``(G [R, R], A [C, C])`` of equal Frobenius norm, the largest product first. Factors of the first are
        positive semi-definite, provided that its start is; later ones are in general indefinite.
    """
    found: list[Pair] = []
    for term in range(terms):
        begin = start[term][1] if start and term < len(start) else torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        found.append(_nearest_term(a, g, begin, iterations, found))
    return found


def fisher_rmse(a: Tensor, g: Tensor, terms: Sequence[Pair]) -> float:
    """Root mean square, over all ``(RC)^2`` elements, of ``F - sum_t kron(G_t, A_t)`` (paper, figure 5).

    It is computed from inner products only: ``|F|^2 = mean_nm (a_n . a_m)^2 (g_n . g_m)^2``,
    ``<F, G (x) A> = mean_n (a_n^T A a_n) (g_n^T G g_n)`` and ``<G (x) A, G' (x) A'> = <G, G'> <A, A'>``. These cancel,
    so that even in float64 an error below 1e-8 of the root mean square of F is rounding.

    Args:
        a: Inputs ``[n, C]``.
        g: Output gradients ``[n, R]``.
        terms: Pairs ``(G [R, R], A [C, C])``.
    """
    a, g = a.double(), g.double()
    wide = [(gradient.double(), inputs.double()) for gradient, inputs in terms]
    squared = _fisher_norm_squared(a, g)
    for gradient, inputs in wide:
        squared -= 2 * float((_quadratic_forms(a, inputs) * _quadratic_forms(g, gradient)).mean())
        squared += sum(float((gradient * other_g).sum() * (inputs * other_a).sum()) for other_g, other_a in wide)
    return math.sqrt(max(squared, 0.0)) / (a.shape[1] * g.shape[1])


def _nearest_term(a: Tensor, g: Tensor, input_factor: Tensor, iterations: int, earlier: Sequence[Pair]) -> Pair:
    mirrored = [(inputs, gradient) for gradient, inputs in earlier]
    for _ in range(iterations):
        total = gradient_half_step(a, g, input_factor)
        gradient_factor, _ = finished_half_step(total, len(a), input_factor, earlier)
        total = input_half_step(a, g, gradient_factor)
        input_factor, sigma = finished_half_step(total, len(a), gradient_factor, mirrored)
    return balanced_pair(gradient_factor, input_factor, sigma)


def _fisher_norm_squared(a: Tensor, g: Tensor) -> float:
    """Squared norm ``|F|^2 = mean_nm (a_n . a_m)^2 (g_n . g_m)^2``, some n at a time."""
    chunk = max(1, GRAM_ELEMENTS // len(a))
    blocks = zip(a.split(chunk), g.split(chunk), strict=True)
    return sum(float(((x @ a.T) * (y @ g.T)).square().sum()) for x, y in blocks) / len(a) ** 2


def _quadratic_forms(x: Tensor, matrix: Tensor) -> Tensor:
    """Quadratic forms ``x_n^T M x_n [n]`` of the rows of ``x [n, m]``."""
    return ((x @ matrix) * x).sum(1)
