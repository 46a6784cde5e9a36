"""Likeness of two pruned models by the weights that they lost."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def mask_equivalence(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Share of the removed weights that two models have in common (paper, eq. 29).

    Eq. 29 as printed divides by all weights, so that a model at half its size would have an equivalence of one half
    with itself; the paper's table has ones there. This function divides by the weights removed, of which two models of
    one size have equally many. Two masks that know nothing of each other have an equivalence of their sparsity.

    Args:
        first: Removed weights per layer, bool ``[R, C]``, True = removed.
        second: Removed weights of the other model, for the same layers.

    Returns:
        A share between 0 and 1; 1 if neither model lost a weight.

    Raises:
        ValueError: If the layers are not the same.
    """
    if first.keys() != second.keys() or any(first[name].shape != second[name].shape for name in first):
        raise ValueError("The two models do not have the same layers.")
    both = sum(int((first[name] & second[name]).sum()) for name in first)
    removed = sum(int(first[name].sum()) + int(second[name].sum()) for name in first)
    return 2 * both / removed if removed else 1.0
