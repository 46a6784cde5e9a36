"""How a model is run while it is measured: evaluation mode, no weight gradients, chosen arithmetic; all restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from llm_surgeon.models.attention import attention_by_blocks


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients; restores both."""
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


@contextlib.contextmanager
def products(precision: str) -> Iterator[None]:
    """``bfloat16``: products of float32 matrices may round their inputs; results and sums stay float32."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Reduced precision for the model pass and inside the factors' products, or full precision for both.

    The products' results stay float32: a *sum* rounded to bfloat16 would be indefinite, rounded *inputs* are not.
    """
    with products(precision), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        yield


@contextlib.contextmanager
def reduced_weights(model: nn.Module, precision: str) -> Iterator[None]:
    """With ``bfloat16``, let linear layers hold their weights in it, as autocast would cast them batch after batch.

    The embedding keeps its own, also where the head shares it. Weights in half precision are left alone.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and precision == "bfloat16"]
    before = [(layer, layer.weight) for layer in layers if layer.weight.dtype == torch.float32]
    try:
        for layer, weight in before:
            with torch.no_grad():
                layer.weight = nn.Parameter(weight.to(torch.bfloat16), requires_grad=False)
        yield
    finally:
        for layer, weight in before:
            layer.weight = weight


@contextlib.contextmanager
def fast_pass(model: nn.Module, precision: str) -> Iterator[None]:
    """A model that is only run, not changed: frozen, with weights and attention as the precision allows."""
    with frozen(model), reduced_weights(model, precision), attention_by_blocks():
        yield
