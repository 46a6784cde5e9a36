"""Modes of a model while it is measured: evaluation, no weight gradients, chosen arithmetic; all are restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from llm_surgeon.models.attention import attention_by_blocks


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Freeze a model: evaluation mode without parameter gradients. Both are restored."""
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
    """Allow products of float32 matrices to round their inputs with ``bfloat16``; results and sums stay float32."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Set the precision of the model pass and of the factors' products: reduced with ``bfloat16``, else full.

    The products' results stay float32: a *sum* rounded to bfloat16 would be indefinite, rounded *inputs* are not.
    """
    with products(precision), torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        yield


@contextlib.contextmanager
def reduced_weights(model: nn.Module, precision: str) -> Iterator[None]:
    """Hold the weights of linear layers in bfloat16 with ``bfloat16``: autocast would cast them batch after batch.

    The embedding keeps its own weights, also where the head shares them. Weights in half precision are left alone.
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
    """Make a model ready for passes that do not change it: frozen, with weights and attention for the precision."""
    with frozen(model), reduced_weights(model, precision), attention_by_blocks():
        yield
