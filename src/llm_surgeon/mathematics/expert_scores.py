"""Scores of the experts of a mixture by what they put out for the tokens that the router sends to them.

Pure functions of statistics. The expert with the lowest score goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# An expert carries extreme activations if its largest output is among the largest of so many of all experts, and at
# least this part of the very largest.
_RARE, _PART = 0.995, 0.1


@dataclass(frozen=True)
class ExpertStatistics:
    """Sums over the tokens of each expert, float64 ``[experts]`` each.

    Attributes:
        tokens: Number of tokens.
        norms: Sum of the norms of the outputs.
        weighted: Sum of the norms, each times the expert's share of the token's routing weights.
        peaks: Largest magnitude of an output's element.
    """

    tokens: Tensor
    norms: Tensor
    weighted: Tensor
    peaks: Tensor


def reap(seen: ExpertStatistics) -> Tensor:
    """Mean over an expert's tokens of its routing share times the norm of its output (REAP, ICLR 2026)."""
    return seen.weighted / seen.tokens.clamp(min=1)


def mean_norm(seen: ExpertStatistics) -> Tensor:
    """Mean norm of an expert's outputs over its tokens."""
    return seen.norms / seen.tokens.clamp(min=1)


def frequency(seen: ExpertStatistics) -> Tensor:
    """Number of an expert's tokens."""
    return seen.tokens


# Names are those of the methods in ``recipe.methods.METHODS``.
EXPERT_SCORES: dict[str, Callable[[ExpertStatistics], Tensor]] = {
    "reap": reap,
    "mean-norm": mean_norm,
    "frequency": frequency,
}


def extreme(peaks: Tensor) -> Tensor:
    """Experts that carry extreme activations, on which all later blocks rely (Su et al. 2025, "super experts").

    Args:
        peaks: Largest magnitude in the outputs of each expert of all blocks, ``[n]``.

    Returns:
        bool ``[n]``.
    """
    return (peaks >= torch.quantile(peaks, _RARE)) & (peaks > _PART * peaks.max())
