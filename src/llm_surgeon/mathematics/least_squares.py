"""Least squares on the inputs of a pruned network: pure functions of sums over tokens.

The updates of ``updates.py`` know each layer alone, on inputs of the model as it was before the shot. Errors of the
layers below add up in the residual stream, and no update answers for them. Here a linear layer that writes into the
stream takes over what is missing there. With its inputs ``x`` in the pruned network ``[C]`` and the error ``e`` of the
stream behind it, dense minus pruned, in the rows that the layer keeps ``[K]``, its weights change by ``D`` that
minimises the mean over tokens

    |e - D x|^2 + lambda |D|_F^2,    so that  D = E A_l^-1,  E = mean e x^T [K, C],  A_l = mean x x^T + lambda I.

The ridge holds the weights at those that the update has found, not at zero: with no error nothing changes. Weighting
the error of the kept rows with a matrix, such as their block of the factor G, would change nothing, as each row has its
own least-squares problem with the same ``A``. The error in rows that the layer has lost is left alone: G would let the
kept rows make up for part of it.

A fit to few tokens promises more than it keeps. Least squares answers noise with a smaller stream, but the
last norm makes that as large as any other, so that predictions come out surer than they are right: their logits ``u``
have to be scaled. The mean negative log-likelihood of the text ``f(s) = mean(log sum_v exp(s u_v) - s u_label)`` is
convex in the scale, with

    f'(1) = mean(E_p[u] - u_label),    f''(1) = mean Var_p[u],    p = softmax(u),

and one Newton step from 1 comes close to its minimum where that is close to 1 (temperature scaling, Guo et al., ICML
2017).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_surgeon.mathematics.linalg import damped_cholesky, damping_of

# Beyond this scale a parabola says little of where the minimum is.
LARGEST_SCALE = 1.25


def reconstructing_change(error_by_input: Tensor, a: Tensor, ridge: float, name: str) -> Tensor:
    """Change ``D [K, C]`` of a layer's weights that takes over the error of the stream behind the layer.

    Args:
        error_by_input: ``E [K, C]``, mean over tokens of error times input.
        a: ``[C, C]``, mean over tokens of ``x x^T``; a bias is a trailing input of 1.
        ridge: Lambda as a fraction of the mean of the diagonal of ``a``.
        name: Name of ``a``, for error messages.

    Raises:
        NonFiniteError: If ``a`` holds NaN or infinity.
        NotPositiveDefiniteError: If ``a`` has no decomposition even with a larger ridge.

    Source: ridge regression on the inputs of the compressed network, as in ThiNet (Luo et al., ICCV 2017) and channel
    pruning (He et al., ICCV 2017), here towards the stream of the dense model instead of the layer's own output.
    """
    factor = damped_cholesky(a, damping_of(a, ridge), name)
    change: Tensor = torch.cholesky_solve(error_by_input.T, factor).T
    return change


def logit_scale(slope: float, curvature: float) -> float:
    """Scale of the logits after a Newton step from 1, of no more than a factor of ``LARGEST_SCALE`` either way.

    Args:
        slope: Derivative of the mean negative log-likelihood by the scale, at 1, in nats.
        curvature: Second derivative; where it is zero the scale does not matter, and stays.
    """
    if not curvature > 0:
        return 1.0
    return min(max(1 - slope / curvature, 1 / LARGEST_SCALE), LARGEST_SCALE)
