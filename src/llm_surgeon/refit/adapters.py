"""Low-rank adapters on linear layers: put on, absorbed into the weights, and taken off without a trace.

Only this file imports ``peft``, which is optional. It is imported itself only where adapters are wanted.
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
    """A linear layer with the weight ``W + mask * (B A)``; without a mask it computes as peft's own layer.

    ``element_mask [rows, columns]`` is True where a weight may change.
    """

    element_mask: Tensor | None = None

    @property
    def core(self) -> nn.Linear:
        """The layer below the adapter."""
        return cast(nn.Linear, self.get_base_layer())

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Change of the weight by absorbing, ``[rows, columns]``, zero where the mask is False."""
        # Autocast would round the product in training, but not when the adapter is absorbed.
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
        model: The model. Its weights are frozen by peft; ``frozen`` undoes that.
        targets: Element masks ``[rows, columns]`` (True = may change) or None, by the full names of ``nn.Linear``
            modules, none of them empty.
        rank: Rank of the adapters; more than the rank of a matrix is allowed, and has no use.
        seed: Seed of the random factors; the global random state does not change.

    Yields:
        The adapted layers in the order of ``targets``, with factors in float32 at least.
    """
    before = {name: model.get_submodule(name) for name in targets}
    # The scale is 1: for Adam, another scale is only another learning rate.
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
    """The adapted layer with its mask, and with float32 factors: peft's have the weight's type, too coarse to train."""
    layer = model.get_submodule(name)
    assert isinstance(layer, MaskedLoraLinear)
    layer.element_mask = None if mask is None else mask.to(layer.core.weight.device)
    for factor in layer.factors():
        factor.data = factor.data.to(torch.promote_types(factor.dtype, torch.float32))
    return layer


@torch.no_grad()
def absorb(layers: list[MaskedLoraLinear]) -> None:
    """Write the corrected weights into the layers below the adapters: all of them, or none on an error.

    All old and corrected weights exist side by side for a moment.

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
        # The copy is in place: the layer's memory stays the same, so a continued run computes the same to the last bit.
        layer.core.weight.copy_(weight)
