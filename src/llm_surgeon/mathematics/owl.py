"""OWL, outlier-weighted sparsities of the blocks of a model (Yin et al., ICML 2024).

Blocks with more outliers among the scores ``|W| ||x||`` lose less. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor


def outlier_ratio(scores: Iterable[Tensor], multiple: float) -> float:
    """Share of the scores of a block that exceed ``multiple`` times their mean.

    Args:
        scores: ``|W| ||x_c||`` of the block's layers, of any shapes, non-negative.
        multiple: The paper's M.
    """
    parts = [part.flatten() for part in scores]
    count = sum(len(part) for part in parts)
    bound = multiple * sum(float(part.double().sum()) for part in parts) / count
    return sum(int((part > bound).sum()) for part in parts) / count


def outlier_weighted(ratios: Sequence[float], weights: Sequence[int], sparsity: float, spread: float) -> list[float]:
    """Sparsity of each block: the lower, the more outliers it has; the target on average.

    The ratios are mapped linearly to an interval of width ``2 spread``, which is shifted so that the weights removed
    make the target.

    Args:
        ratios: Outlier ratio of each block.
        weights: Prunable weights of each block.
        sparsity: The target over all blocks.
        spread: The paper's lambda.

    Raises:
        ValueError: If the sparsity of a block would not be between 0 and 1; names the block.
    """
    low, high = min(ratios), max(ratios)
    if low == high:
        return [sparsity] * len(ratios)
    spared = [2 * spread * (ratio - low) / (high - low) for ratio in ratios]
    mean = sum(part * count for part, count in zip(spared, weights, strict=True)) / sum(weights)
    sparsities = [sparsity + mean - part for part in spared]
    for block, own in enumerate(sparsities):
        if not 0 <= own <= 1:
            raise ValueError(f"block {block} would have a sparsity of {own:.3g}")
    return sparsities
