"""Adapters in place of all weights: low-rank matrices that are trained, and absorbed at the end."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.recovery.sharding import whole
from llm_surgeon.refit.adapters import MaskedLoraLinear, attached

logger = logging.getLogger(__name__)


@contextmanager
def adapted(model: PreTrainedModel, blocks: str, rank: int, seed: int) -> Iterator[dict[str, MaskedLoraLinear]]:
    """Put adapters on the linear layers of a model's blocks, where zeros stay zero, and take them off at the end.

    Args:
        model: The model, all else of which is frozen.
        blocks: Path of the list of its blocks.
        rank: Rank of the adapters.
        seed: Seed of their random factors.

    Yields:
        The layers with adapters, by name.

    Raises:
        UnsupportedModelError: If the blocks have no linear layers.
    """
    found = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(f"{blocks}.") and module.weight.numel()
    }
    if not found:
        raise UnsupportedModelError(
            "The blocks have no linear layers of torch, on which adapters could sit.", "Leave --adapters out."
        )
    within = (one for name, one in model.named_parameters() if name.startswith(f"{blocks}."))
    others = sum(one.numel() for one in within if one.ndim > 2)
    if others:
        logger.warning("%s weights of experts are in no linear layers, and have no adapters", f"{others:,}")
    masks = {name: (weight != 0) if bool((weight == 0).any()) else None for name, weight in found.items()}
    model.requires_grad_(False)
    with attached(model, masks, rank, seed) as layers:
        yield dict(zip(masks, layers, strict=True))


@torch.no_grad()
def absorbed(layers: dict[str, MaskedLoraLinear]) -> Iterator[tuple[str, Tensor]]:
    """Yield the corrected weight ``[rows, columns]`` of each layer by its name, in float32 at least.

    All processes have to take them, as each holds a part.
    """
    for name, layer in layers.items():
        down, up = (whole(factor) for factor in layer.factors())
        change = up @ down
        if layer.element_mask is not None:
            change = change * layer.element_mask
        yield f"{name}.weight", whole(layer.core.weight) + change
