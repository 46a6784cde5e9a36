"""Low-rank adapters on linear layers: put on, absorbed into the weights, taken off without a trace.

The one file that imports ``peft``, which is optional: import this file only where adapters are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llm_surgeon.errors import NonFiniteError

_ADAPTER = "correction"


class MaskedLoraLinear(LoraLinear):
    """A linear layer with the weight ``W + mask * (B A)``; without a mask, peft's own layer.

    ``element_mask [rows, columns]`` is True where a weight may change.
    """

    element_mask: Tensor | None = None

    @property
    def core(self) -> nn.Linear:
        """The layer below the adapter."""
        return cast(nn.Linear, self.get_base_layer())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What absorbing adds to the weight: ``[rows, columns]``, zero where the mask is False."""
        # Under autocast the product would be rounded while training, and not when it is absorbed.
        with torch.autocast(self.core.weight.device.type, enabled=False):
            delta: Tensor = super().get_delta_weight(adapter)
        return delta if self.element_mask is None else delta * self.element_mask

    def corrected_weight(self) -> Tensor:
        """The weight with the adapter absorbed, ``[rows, columns]`` in the weight's own type."""
        weight = self.core.weight
        return (weight + self.get_delta_weight(_ADAPTER)).to(weight.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[..., columns]`` to ``[..., rows]``."""
        if self.element_mask is None:
            return super().forward(x, *args, **kwargs)
        return F.linear(x, self.corrected_weight(), self.core.bias)

    def factors(self) -> list[nn.Parameter]:
        """The two matrices to train."""
        return [*self.lora_A.parameters(), *self.lora_B.parameters()]


@contextmanager
def attached(
    model: PreTrainedModel, targets: Mapping[str, Tensor | None], rank: int, seed: int
) -> Iterator[list[MaskedLoraLinear]]:
    """Put adapters that change nothing yet on linear layers, and take them off at the end.

    Nothing is absorbed on the way out, so an error in the body leaves the weights as they were.

    Args:
        model: The model; its weights are frozen by peft, see ``frozen`` to have that undone.
        targets: Full names of ``nn.Linear`` modules, none of them empty, with an element mask
            ``[rows, columns]`` (True = may change) or None.
        rank: Rank of the adapters; more than a matrix has is allowed and of no use.
        seed: Of the random factor; the global random state is left alone.

    Yields:
        The adapted layers in the order of ``targets``, their factors in float32 at least.
    """
    before = {name: model.get_submodule(name) for name in targets}
    # Scale 1: for Adam another scale is another learning rate.
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, bias="none", target_modules=list(targets))
    config._register_custom_module({nn.Linear: MaskedLoraLinear})
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
        yield [_prepared(model, name, mask) for name, mask in targets.items()]
    finally:
        for name, module in before.items():
            model.set_submodule(name, module)
        if hasattr(model, "peft_config"):
            del model.peft_config


def _prepared(model: PreTrainedModel, name: str, mask: Tensor | None) -> MaskedLoraLinear:
    """An adapted layer with its mask; peft makes the factors in the weight's type, too coarse to train in."""
    layer = model.get_submodule(name)
    assert isinstance(layer, MaskedLoraLinear)
    layer.element_mask = None if mask is None else mask.to(layer.core.weight.device)
    for factor in layer.factors():
        factor.data = factor.data.to(torch.promote_types(factor.dtype, torch.float32))
    return layer


@torch.no_grad()
def absorb(layers: list[MaskedLoraLinear]) -> None:
    """Write the corrected weights into the layers below the adapters: all of them, or none on an error.

    For a moment old and corrected weights exist side by side.

    Raises:
        NonFiniteError: If a corrected weight is not finite.
    """
    corrected = [layer.corrected_weight() for layer in layers]
    if not all(bool(weight.isfinite().all()) for weight in corrected):
        raise NonFiniteError(
            "A weight is not finite after its correction, so the corrections were dropped.",
            "Use a lower learning rate for the corrections, or --dtype float32.",
        )
    for layer, weight in zip(layers, corrected, strict=True):
        # In place: a layer lies where it lay before, so that a continued run computes the same to the last bit.
        layer.core.weight.copy_(weight)
