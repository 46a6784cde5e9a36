"""Gates: two numbers for each head and each group of neurons, chosen by the loss; pure functions.

Pruning and reconstruction weigh a part of the network by squared errors of its outputs. How much of it the loss wants
is another question, and numbers that are few beside the weights answer it. Such a number, a gate, is 1 at first and
multiplies some of the rows or of the columns of one layer: what a head or a group of neurons adds to the residual
stream, how sharply a head attends, how sharply a group of neurons switches. In the end it is in the weights.

With ``l`` the loss of the text, summed over its tokens, and ``z`` what a gate multiplies, the relative derivative of
``l`` by the gate is a sum over positions of ``c_t = z_t . dl/dz_t``, the *effect* of the gate there. Relative changes
``d`` of all gates change the mean loss by

    L(d) - L(0) ~ s . d + d . F d / 2,    s = mean c_t,    F = mean c_t c_t^T  (empirical Fisher)

where effects at different positions are taken for independent, as K-FAC does. A damped Newton step minimises it:

    d = -(F + lambda I)^-1 s.

Damping says how far from 1 gates are expected to be, and the text itself tells (MacKay 1992, "Bayesian interpolation").
If, before ``n`` tokens are seen, the changes of all ``G`` gates are drawn from a normal distribution around 0 with a
variance of ``1 / (n lambda)``, the step is their mean once they are seen. The mean of ``exp(-n (L(d) - L(0)))`` over
what is drawn is the *evidence* of ``lambda``: how many times better models with such gates explain the text than the
model without. Of Gaussians that integral is

    log evidence(lambda) = n s . (F + lambda I)^-1 s / 2 - log det(I + F / lambda) / 2.

The first term is what the step saves, the second how small a share of what might have been drawn saves so much.

As effects do depend on each other, F knows too little of how the loss bends along ``d``. One more pass tells: with the
loss at ``d``, a parabola through both losses and the slope ``s . d`` has its minimum at a length that is taken.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_surgeon.mathematics.linalg import damped_cholesky, damping_of

NAME = "the gates"
# A gate changes by half of what it is at most, and a step is at most so much longer than it was tried.
LARGEST_CHANGE = 0.5
LONGEST = 1.5
# Damping is looked for so many times a factor of two from the mean of the Fisher's diagonal at most, which a
# decomposition in float32 allows.
MOST_DOUBLINGS = 10


def effects(values: Tensor, gradients: Tensor, members: Tensor, gates: int) -> Tensor:
    """What relative changes of gates do to the loss at each token: ``[tokens, gates]`` float32.

    Args:
        values: What gates multiply, ``[tokens, size]``.
        gradients: Of the loss by these, the same shape.
        members: The gate of each of them, ``[size]``; -1 for none.
        gates: How many there are.
    """
    products = values.float() * gradients.float()
    sums = products.new_zeros(len(products), gates + 1)
    # An index of -1 is none to index_add: what has no gate goes to one that is dropped.
    return sums.index_add_(1, members.where(members >= 0, gates), products)[:, :gates]


def log_evidence(slopes: Tensor, fisher: Tensor, damping: float, tokens: int) -> float:
    """How much better the text is explained with gates that a damping allows than with none, in nats.

    Args:
        slopes: Mean effects, ``[gates]``.
        fisher: Mean products of effects, ``[gates, gates]``.
        damping: Lambda.
        tokens: How many the means are of.

    Raises:
        NonFiniteError: If ``fisher`` holds NaN or infinity.
        NotPositiveDefiniteError: If it has no decomposition even with more damping.
    """
    factor = damped_cholesky(fisher, damping, NAME)
    saved = torch.linalg.solve_triangular(factor, slopes[:, None], upper=False).double().square().sum() / 2
    # Of the diagonal of the factor, divided by the root of lambda: half of log det(I + F / lambda).
    spread = (factor.diagonal().double().log() - math.log(damping) / 2).sum()
    return float(tokens * saved - spread)


def evidence_damping(slopes: Tensor, fisher: Tensor, tokens: int) -> float:
    """The damping with the largest evidence nearest to the mean of the diagonal of ``fisher``, to a factor of two.

    Args, errors: As of ``log_evidence``.
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

    Raises:
        NonFiniteError: If ``fisher`` holds NaN or infinity.
        NotPositiveDefiniteError: If it has no decomposition even with more damping.

    Returns:
        The step; shortened if a gate would change by more than ``LARGEST_CHANGE``.
    """
    factor = damped_cholesky(fisher, damping, NAME)
    step = -torch.cholesky_solve(slopes[:, None], factor)[:, 0]
    largest = float(step.abs().max())
    return step if largest <= LARGEST_CHANGE else step * (LARGEST_CHANGE / largest)


def step_length(slope: float, rise: float) -> float:
    """How much of a step to take: where a parabola has its minimum, between 0 and ``LONGEST``.

    Args:
        slope: Of the loss along the step, at its beginning.
        rise: Loss at its end, less that at its beginning.
    """
    bend = 2 * (rise - slope)
    if bend <= 0:
        return LONGEST if slope < 0 else 0.0
    return min(max(-slope / bend, 0.0), LONGEST)


def rise_at(length: float, slope: float, rise: float) -> float:
    """What that parabola says of the loss after so much of a step, less that at its beginning."""
    return length * slope + length**2 * (rise - slope)
