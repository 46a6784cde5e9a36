"""Layer norms of half-precision models under autocast on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CastingLayerNorm(nn.LayerNorm):
    """A layer norm whose parameters take the type of its input.

    Autocast makes the stream of a float16 model float32, and torch has no layer norm on a CPU for an input of one type
    and float16 parameters. OPT and Pythia are stored so.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[..., width]``; the output has the input's type."""
        weight, bias = (None if part is None else part.to(input.dtype) for part in (self.weight, self.bias))
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def cast_layer_norms(model: nn.Module) -> list[nn.Module]:
    """Let the layer norms of a float16 model take the type of their inputs, in place; returns the changed modules."""
    changed: list[nn.Module] = [
        module
        for module in model.modules()
        if type(module) is nn.LayerNorm and any(part.dtype == torch.float16 for part in module.parameters())
    ]
    for module in changed:
        module.__class__ = CastingLayerNorm
    return changed
