"""Histogram of the scores of all candidates, for the report."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from llm_surgeon.records import CostHistogram

# The grid is fixed, so that one pass over a hundred million scores is enough; empty ends are cut off.
STEP = 0.2
LOWEST, HIGHEST = -40.0, 20.0
_BINS = round((HIGHEST - LOWEST) / STEP)


def cost_histogram(scored: Iterable[tuple[Tensor, Tensor]], score: str, threshold: float) -> CostHistogram:
    """Count candidates by the logarithm of their score.

    Args:
        scored: Pairs of scores ``[n]``, non-negative, and bool ``[n]`` whether each candidate goes.
        score: Name of the score, in words.
        threshold: Largest score removed; minus infinity if none is.
    """
    kept, removed = torch.zeros(_BINS, dtype=torch.float64), torch.zeros(_BINS, dtype=torch.float64)
    outside = 0
    for scores, goes in scored:
        positive = scores > 0
        outside += int((~positive).sum())
        exponents, gone = scores[positive].float().log10().clamp(LOWEST, HIGHEST), goes[positive]
        kept += torch.histc(exponents[~gone], _BINS, LOWEST, HIGHEST)
        removed += torch.histc(exponents[gone], _BINS, LOWEST, HIGHEST)
    filled = (kept + removed).nonzero().flatten().tolist() or [0]
    first, last = filled[0], filled[-1] + 1
    return CostHistogram(
        score=score,
        exponents=tuple(round(LOWEST + STEP * edge, 6) for edge in range(first, last + 1)),
        kept=tuple(int(count) for count in kept[first:last]),
        removed=tuple(int(count) for count in removed[first:last]),
        outside=outside,
        threshold=max(threshold, 0.0),
    )
