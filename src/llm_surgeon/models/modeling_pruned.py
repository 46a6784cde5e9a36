"""Linear layers without their removed rows and columns, and attention without its removed heads.

This text travels inside every exported checkpoint, so it needs torch and transformers only, and nothing of the
package that wrote it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class PrunedLinear(nn.Module):
    """A linear layer that stores its kept rows and columns only, and still has the shape its neighbours expect.

    A removed column ignores that input; a removed row, bias included, outputs zero.

    Args:
        in_features: Width of the input that the neighbours hand over.
        out_features: Width of the output that the neighbours expect.
        kept_in: Number of kept columns, or None if the input is as narrow as the matrix.
        kept_out: Number of kept rows, or None if the output is as narrow as the matrix.
        bias: Whether the layer has a bias.
    """

    input_index: Tensor | None
    output_index: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kept_in: int | None,
        kept_out: int | None,
        bias: bool,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        rows = out_features if kept_out is None else kept_out
        columns = in_features if kept_in is None else kept_in
        self.core = empty_linear(columns, rows, bias, device, dtype)
        self.register_buffer("input_index", None if kept_in is None else _index(kept_in, device))
        self.register_buffer("output_index", None if kept_out is None else _index(kept_out, device))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        # On a CPU, gather and scatter are up to seven and three times as fast as index_select and index_copy.
        if self.input_index is not None:
            x = x.gather(-1, self.input_index.expand(*x.shape[:-1], -1))
        y: Tensor = self.core(x)
        if self.output_index is not None:
            y = y.new_zeros(*y.shape[:-1], self.out_features).scatter_(-1, self.output_index.expand_as(y), y)
        return y

    def extra_repr(self) -> str:
        """Outer shape, for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _index(size: int, device: torch.device | None) -> Tensor:
    return torch.arange(size, device=device)


def empty_linear(
    columns: int, rows: int, bias: bool, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Linear:
    """A linear layer whose values are about to be loaded: no random ones are drawn."""
    linear = nn.Linear(1, 1, bias=bias, device="meta")
    linear.in_features, linear.out_features = columns, rows
    linear.weight = nn.Parameter(torch.empty(rows, columns, device=device, dtype=dtype))
    if bias:
        linear.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
    return linear


def shrink_linears(model: nn.Module, shapes: dict[str, dict[str, Any]]) -> None:
    """Replace the named linear layers by layers of the pruned shapes, values still to be loaded.

    Args:
        model: The architecture; the layers may be dense or pruned before.
        shapes: Per layer name: ``in_features``, ``out_features``, and ``kept_in``, ``kept_out``, which are null where
            the neighbours are as narrow as the matrix.
    """
    for name, shape in shapes.items():
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        before = getattr(parent, child)
        core = before.core if isinstance(before, PrunedLinear) else before
        bias, device, dtype = core.bias is not None, core.weight.device, core.weight.dtype
        pruned: nn.Module
        # Whatever they were before (GPT-2 has transposed layers), pruned layers are plain ones.
        if shape["kept_in"] is None and shape["kept_out"] is None:
            pruned = empty_linear(shape["in_features"], shape["out_features"], bias, device, dtype)
        else:
            pruned = PrunedLinear(**shape, bias=bias, device=device, dtype=dtype)
        setattr(parent, child, pruned.requires_grad_(core.weight.requires_grad).train(before.training))


class NoLinear(nn.Module):
    """A linear layer of which no weight is left: its output is its bias, or zero.

    It has no matrix, as tools that quantise or convert matrices stumble over those without rows or columns.

    Args:
        out_features: Width of the output.
        bias: Whether there is a bias.
    """

    bias: Tensor | None

    def __init__(
        self, out_features: int, bias: bool, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., anything]`` to ``[..., out_features]``."""
        y = x.new_zeros(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Width and bias, for ``print(model)``."""
        return f"out_features={self.out_features}, bias={self.bias is not None}"


def drop_empty_linears(model: nn.Module, shapes: dict[str, dict[str, Any]]) -> None:
    """Replace pruned layers without any weights by what is left of them, values still to be loaded.

    Args:
        model: A model on which ``shrink_linears`` and ``narrow_attention`` have been called.
        shapes: What ``shrink_linears`` was given.
    """
    for name, shape in shapes.items():
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        module = getattr(parent, child)
        core = module.core if isinstance(module, PrunedLinear) else module
        if core.weight.numel() == 0:
            # Of no rows, there is no bias either.
            bias = core.bias is not None and shape["out_features"] > 0
            left = NoLinear(shape["out_features"], bias, core.weight.device, core.weight.dtype)
            setattr(parent, child, left.train(module.training))


# transformers takes the text "Attention(nn.Module)" for attention that has one implementation only.
Module = nn.Module


class EmptyAttention(Module):
    """An attention without any heads: what is left of it is the bias of its output projection, or zero.

    Args:
        before: The attention, whose linear layers are kept under their names.
        output: Name of its output projection.
        returns_tuple: Whether it returns a tuple, its output first, rather than its output.
    """

    def __init__(self, before: nn.Module, output: str, returns_tuple: bool = True) -> None:
        super().__init__()
        self.layer_idx, self.output = getattr(before, "layer_idx", None), output
        self.returns_tuple = returns_tuple
        for name, module in before.named_children():
            if isinstance(module, (nn.Linear, PrunedLinear)):
                self.add_module(name, module)
        self.train(before.training)

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        cache: Any = None,
        past_key_values: Any = None,
        layer_past: Any = None,
        **__: Any,
    ) -> Tensor | tuple[Tensor, None]:
        """Map hidden states ``[batch, length, width]`` to the same shape, and no attention weights."""
        # By the names that versions of transformers and families have for it.
        cache = next((given for given in (cache, past_key_values, layer_past) if given is not None), None)
        if cache is not None:
            # The length of the cached text is read from any layer, so that this one has to keep count.
            none = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(none, none, self.layer_idx)
        left: Tensor = getattr(self, self.output)(hidden_states[..., :0])
        return (left, None) if self.returns_tuple else left


def narrow_attention(model: nn.Module, counts: dict[str, dict[str, int]], emptied: dict[str, dict[str, Any]]) -> None:
    """Tell attention modules how many heads they have left.

    Args:
        model: Its linear layers have the shapes of the heads that are left.
        counts: Per path of an attention: its attributes that count heads, or nothing if it has none left.
            ``config.NAME`` is an entry of the module's own configuration. The value of a parameter is its length.
        emptied: Per path of an attention that has no heads left: arguments of ``EmptyAttention``.
    """
    for path, attributes in counts.items():
        module = model.get_submodule(path)
        if not attributes and not isinstance(module, EmptyAttention):
            parent_name, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent_name), child, EmptyAttention(module, **emptied[path]))
        for name, value in attributes.items():
            if name.startswith("config."):
                module.config = copy.copy(module.config)
                setattr(module.config, name.removeprefix("config."), value)
            else:
                _set_count(module, name, value)


def _set_count(module: nn.Module, name: str, value: int) -> None:
    """Set an attribute of a module, or of a module in it; of a parameter the length, values still to be loaded."""
    parent_name, _, child = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    before = getattr(parent, child, None)
    if not isinstance(before, nn.Parameter):
        setattr(parent, child, value)
    elif len(before) != value:
        setattr(parent, child, nn.Parameter(before.new_empty(value, *before.shape[1:]), before.requires_grad))


def prune(model: nn.Module, config: Any) -> None:
    """Give a model the shapes of its export, values still to be loaded.

    Args:
        model: The dense architecture.
        config: Configuration of the export, with the shapes of the pruned layers and the heads that are left.
    """
    shrink_linears(model, config.pruned_linears)
    narrow_attention(model, config.pruned_attention, config.pruned_attention_emptied)
    drop_empty_linears(model, config.pruned_linears)
