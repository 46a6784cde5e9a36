"""Logits that a model's weights give in float32, whatever the type in which they are stored.

Engines differ in how they round half-precision numbers on the way. Only float32 tells a wrong layer from rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.models.family import Family
from llm_surgeon.models.modes import frozen


@torch.no_grad()
def exact_logits(model: PreTrainedModel, family: Family, ids: list[int]) -> Tensor:
    """Logits ``[tokens, vocabulary]`` of a text, float32 on the CPU.

    Args:
        model: The model, which is left as it was.
        family: Entry of its architecture.
        ids: The text's tokens.
    """
    blocks = cast(nn.ModuleList, model.get_submodule(family.blocks))
    device = next(model.parameters()).device
    with frozen(model), _widened(model, blocks):
        logits: Tensor = model(torch.tensor([ids], device=device), return_dict=True, use_cache=False).logits
        return logits[0].float().cpu()


@contextlib.contextmanager
def _widened(model: nn.Module, blocks: nn.ModuleList) -> Iterator[None]:
    """Have the weights outside the blocks in float32, and those of each block while it runs: no second whole copy."""
    inside = {id(parameter) for parameter in blocks.parameters()}
    kept: list[tuple[nn.Parameter, Tensor]] = []
    handles = []
    try:
        _widen((parameter for parameter in model.parameters() if id(parameter) not in inside), kept)
        for block in blocks:
            own: list[tuple[nn.Parameter, Tensor]] = []
            handles.append(block.register_forward_pre_hook(partial(_before, own)))
            handles.append(block.register_forward_hook(partial(_after, own), always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        _restore(kept)


def _before(own: list[tuple[nn.Parameter, Tensor]], block: nn.Module, _inputs: Any) -> None:
    _widen(block.parameters(), own)


def _after(own: list[tuple[nn.Parameter, Tensor]], _block: nn.Module, _inputs: Any, _output: Any) -> None:
    _restore(own)


def _widen(parameters: Iterable[nn.Parameter], kept: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter in parameters:
        if parameter.dtype != torch.float32:
            kept.append((parameter, parameter.data))
            parameter.data = parameter.data.float()


def _restore(kept: list[tuple[nn.Parameter, Tensor]]) -> None:
    while kept:
        parameter, data = kept.pop()
        parameter.data = data
