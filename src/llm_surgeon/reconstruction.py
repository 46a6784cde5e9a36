"""Least squares on what a pruned network really sees: pure functions of sums over tokens.

The updates of ``updates.py`` know each layer alone, on inputs of the model as it was before the shot. Errors of the
layers below add up in the residual stream, and nothing answers for them. Here a linear layer that writes into the
stream takes over what is missing there. With its inputs ``x`` in the pruned network ``[C]`` and the error ``e`` of the
stream behind it, dense minus pruned, in the rows that the layer keeps ``[K]``, its weights change by ``D`` that
minimises the mean over tokens

    |e - D x|^2 + lambda |D|_F^2,    so that  D = E A_l^-1,  E = mean e x^T [K, C],  A_l = mean x x^T + lambda I.

The ridge holds the weights at those that the update has found, not at zero: with no error nothing changes. Weighting
the error of the kept rows with a matrix, such as their block of the factor G, would change nothing, as each row has its
own least-squares problem with the same ``A``. The error in rows that the layer has lost is left alone: G would let the
kept rows make up for part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_surgeon.linalg import damped_cholesky, damping_of


def reconstructing_change(error_by_input: Tensor, a: Tensor, ridge: float, name: str) -> Tensor:
    """The change ``D [K, C]`` of a layer's weights that takes over the error of the stream behind it.

    Args:
        error_by_input: ``E [K, C]``, mean over tokens of error times input.
        a: ``[C, C]``, mean over tokens of ``x x^T``; a bias is a trailing input of 1.
        ridge: Lambda as a fraction of the mean of the diagonal of ``a``.
        name: What ``a`` is, for error messages.

    Raises:
        NonFiniteError: If ``a`` holds NaN or infinity.
        NotPositiveDefiniteError: If ``a`` has no decomposition even with a larger ridge.

    Source: ridge regression on the inputs of the compressed network, as in ThiNet (Luo et al., ICCV 2017) and channel
    pruning (He et al., ICCV 2017), here towards the stream of the dense model instead of the layer's own output.
    """
    factor = damped_cholesky(a, damping_of(a, ridge), name)
    change: Tensor = torch.cholesky_solve(error_by_input.T, factor).T
    return change
