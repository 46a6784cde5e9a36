"""Gates, two numbers for each head and each group of neurons, chosen by a Newton step on the loss; pure functions.

Pruning and reconstruction weigh a part of the network by squared errors of its outputs. How much of that part the loss
wants is another question, and a few numbers beside the weights answer it. Such a number, a gate, is 1 at first and
multiplies some of the rows or of the columns of one layer: what a head or a group of neurons adds to the residual
stream, how sharply a head attends, how sharply a group of neurons switches. In the end the gates are multiplied into
the weights.

With ``l`` the loss of the text, summed over its tokens, and ``z`` what a gate multiplies, the relative derivative of
``l`` by the gate is a sum over positions of ``c_t = z_t . dl/dz_t``, the *effect* of the gate there. Relative changes
``d`` of all gates change the mean loss by

    L(d) - L(0) ~ s . d + d . F d / 2,    s = mean c_t,    F = mean c_t c_t^T  (empirical Fisher)

where effects at different positions are taken for independent, as K-FAC does. A damped Newton step minimises it:

    d = -(F + lambda I)^-1 s.

Damping says how far from 1 gates are expected to be, and the text itself tells (MacKay 1992, "Bayesian interpolation").
If, before ``n`` tokens are seen, the changes of all ``G`` gates are drawn from a normal distribution around 0 with a
variance of ``1 / (n lambda)``, the step is their mean once the tokens are seen. The mean of
``exp(-n (L(d) - L(0)))`` over the changes drawn is the *evidence* of ``lambda``: how many times better models with such
gates explain the text than the model without. Of Gaussians that integral is

    log evidence(lambda) = n s . (F + lambda I)^-1 s / 2 - log det(I + F / lambda) / 2.

The first term is what the step saves, the second how small a share of what might have been drawn saves so much.

As effects do depend on each other, F knows too little of how the loss bends along ``d``. One more pass measures the
loss at ``d``. A parabola through both losses with the slope ``s . d`` has its minimum at the length that is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_surgeon.mathematics.linalg import damped_cholesky, damping_of

NAME = "the gates"
# Largest relative change of a gate, and the largest length of a step in units of the step that was tried.
LARGEST_CHANGE = 0.5
LONGEST = 1.5
# Largest distance, in factors of two, of the damping from the mean of the Fisher's diagonal: a decomposition in float32
# allows this many.
MOST_DOUBLINGS = 10
# Number of values that are multiplied with their gradients at once.
_AT_ONCE = 2**20


def effects(values: Tensor, gradients: Tensor, members: Tensor, gates: int) -> Tensor:
    """Effects of relative changes of gates on the loss at each token, ``[tokens, gates]`` float32.

    Where float32 products are allowed to round their inputs to bfloat16, the products of values and gradients are
    rounded so before they are added up, as both of them were themselves.

    Args:
        values: Values that the gates multiply, ``[tokens, size]``.
        gradients: Gradients of the loss by these values, ``[tokens, size]``.
        members: Gate of each value, ``[size]``; -1 for none.
        gates: Number of gates.
    """
    # A product with the matrix that says which value has which gate, in pieces that a cache holds, takes 0.4 of the
    # time of adding up the values of all tokens by their index (8,192 tokens of 1,000 values on 2 cores).
    belongs = (members[:, None] == torch.arange(gates, device=members.device)).float()
    rows = max(1, _AT_ONCE // max(1, len(members)))
    found = [
        (some.float() * at.float()) @ belongs
        for some, at in zip(values.split(rows), gradients.split(rows), strict=True)
    ]
    return torch.cat(found)


def log_evidence(slopes: Tensor, fisher: Tensor, damping: float, tokens: int) -> float:
    """Log evidence of a damping: how much better gates explain the text than no gates do, in nats.

    Args:
        slopes: Mean effects, ``[gates]``.
        fisher: Mean products of effects, ``[gates, gates]``.
        damping: Lambda.
        tokens: Number of tokens that the means are of.

    Raises:
        NonFiniteError: If ``fisher`` holds NaN or infinity.
        NotPositiveDefiniteError: If it has no decomposition even with more damping.
    """
    factor = damped_cholesky(fisher, damping, NAME)
    saved = torch.linalg.solve_triangular(factor, slopes[:, None], upper=False).double().square().sum() / 2
    # Half of log det(I + F / lambda), from the diagonal of the factor divided by the root of lambda.
    spread = (factor.diagonal().double().log() - math.log(damping) / 2).sum()
    return float(tokens * saved - spread)


def evidence_damping(slopes: Tensor, fisher: Tensor, tokens: int) -> float:
    """Damping of the largest evidence, to a factor of two: the maximum nearest to the mean of the Fisher's diagonal.

    Args:
        slopes: Mean effects, ``[gates]``.
        fisher: Mean products of effects, ``[gates, gates]``.
        tokens: Number of tokens that the means are of.

    Raises:
        NonFiniteError: If ``fisher`` holds NaN or infinity.
        NotPositiveDefiniteError: If it has no decomposition even with more damping.
    """
    middle = damping_of(fisher, 1.0)
    best, most = 0, log_evidence(slopes, fisher, middle, tokens)
    for direction in (1, -1):
        for doublings in range(direction, direction * (MOST_DOUBLINGS + 1), direction):
            evidence = log_evidence(slopes, fisher, middle * 2.0**doublings, tokens)
            if evidence <= most:
                break
            best, most = doublings, evidence
        if best:
            break
    return middle * 2.0**best


def newton_step(slopes: Tensor, fisher: Tensor, damping: float) -> Tensor:
    """Relative changes of the gates ``[gates]`` that minimise the damped second-order model of the loss.

    Args:
        slopes: Mean effects, ``[gates]``.
        fisher: Mean products of effects, ``[gates, gates]``.
        damping: Lambda.

    Returns:
        The step; shortened if a gate would change by more than ``LARGEST_CHANGE``.

    Raises:
        NonFiniteError: If ``fisher`` holds NaN or infinity.
        NotPositiveDefiniteError: If it has no decomposition even with more damping.
    """
    factor = damped_cholesky(fisher, damping, NAME)
    step = -torch.cholesky_solve(slopes[:, None], factor)[:, 0]
    largest = float(step.abs().max())
    return step if largest <= LARGEST_CHANGE else step * (LARGEST_CHANGE / largest)


def step_length(slope: float, rise: float) -> float:
    """Length of a step, in units of the step tried: where a parabola has its minimum, between 0 and ``LONGEST``.

    Args:
        slope: Slope of the loss along the step, at its beginning.
        rise: Loss at the end of the step, less the loss at its beginning.
    """
    bend = 2 * (rise - slope)
    if bend <= 0:
        return LONGEST if slope < 0 else 0.0
    return min(max(-slope / bend, 0.0), LONGEST)


def rise_at(length: float, slope: float, rise: float) -> float:
    """Rise of the loss after ``length`` of a step, by the parabola of ``step_length``."""
    return length * slope + length**2 * (rise - slope)
