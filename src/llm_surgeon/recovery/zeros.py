"""Weights that pruning has set to zero, and that stay zero while the others are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class Zeros:
    """Masks of the zeros in the matrices of a model.

    Every zero of a matrix counts as pruned: dense matrices have hardly any, and these few do no harm. A weight without
    a gradient stays where it is, as AdamW's step is 0 for it, and weight decay takes a share of 0.

    Args:
        parameters: Parameters by name; sharded ones have masks that are sharded alike.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._masks: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            mask = parameter.detach() != 0
            if parameter.ndim > 1 and not _all(mask):
                self._masks[name] = mask

    @torch.no_grad()
    def clear_gradients(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Set the gradients of the zeros to zero."""
        for name, mask in self._masks.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient.mul_(mask)


def _all(mask: Tensor) -> bool:
    """Whether all is True in this process's part of a mask."""
    local = mask.to_local() if hasattr(mask, "to_local") else mask
    return bool(local.all())
