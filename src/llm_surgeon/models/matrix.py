"""A prunable linear layer as one matrix with its bias, and its physical replacement by a smaller one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from llm_surgeon.errors import NonFiniteError
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.mathematics.linalg import is_finite
from llm_surgeon.models.anatomy import Anatomy, LinearLayer, to_index
from llm_surgeon.models.modeling_pruned import PrunedLinear, narrow_attention, shrink_linears
from llm_surgeon.models.streaming import weights_of


def read_matrix(model: nn.Module, layer: LinearLayer) -> Tensor:
    """Read the weights of the kept rows and columns, the bias as last column: ``[R, C]`` float32 (float64 stays)."""
    core = core_of(model, layer)
    weight, bias = core.weight.detach(), core.bias
    matrix = weight if bias is None else torch.cat([weight, bias.detach()[:, None]], dim=1)
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def core_of(model: nn.Module, layer: LinearLayer) -> nn.Linear:
    """The module that holds a layer's weights."""
    module = model.get_submodule(layer.name)
    return module.core if isinstance(module, PrunedLinear) else module  # type: ignore[return-value]


def layer_shape(layer: LinearLayer, keep: KeepMask, extent: KeepMask) -> dict[str, int | None]:
    """Arguments that rebuild a pruned layer, see ``shrink_linears``.

    Args:
        layer: The layer.
        keep: Rows and columns that are left of the layer.
        extent: Rows and columns that the tensors around the layer still have, see ``Anatomy.extents``. Where they are
            the kept ones, the layer needs no index.
    """
    (rows, columns), (outputs, inputs) = keep.shape, extent.shape
    return {
        "in_features": inputs,
        "out_features": outputs,
        "kept_in": None if columns == inputs else columns,
        "kept_out": None if rows == outputs else rows,
    }


@torch.no_grad()
def write_matrix(model: nn.Module, layer: LinearLayer, keep: KeepMask, extent: KeepMask, matrix: Tensor) -> None:
    """Write ``matrix [kept rows, kept columns (+ bias)]`` into a layer, in a smaller module if the layer has shrunk.

    Args:
        model: The model, changed in place.
        layer: The layer.
        keep: Rows and columns that are left of the layer.
        extent: Rows and columns that the tensors around the layer still have, see ``Anatomy.extents``.
        matrix: New weights of the layer.
    """
    before, shape = model.get_submodule(layer.name), layer_shape(layer, keep, extent)
    if shape != _shape_of(before):
        shrink_linears(model, {layer.name: shape})
    module = model.get_submodule(layer.name)
    if isinstance(module, PrunedLinear):
        for index, kept, there in (
            (module.input_index, keep.columns, extent.columns),
            (module.output_index, keep.rows, extent.rows),
        ):
            if index is not None:
                index.copy_(to_index(kept[there]))
    core = core_of(model, layer)
    weights = weights_of(model)
    weights.write(core.weight, matrix[:, : core.in_features])
    if layer.bias:
        weights.write(core.bias, matrix[:, -1])


@torch.no_grad()
def cut_out(model: nn.Module, anatomy: Anatomy, keep: Mapping[str, KeepMask]) -> None:
    """Cut the removed rows and columns out of a dense model, in place, without an update of the other weights."""
    extents = anatomy.extents(keep)
    for name, layer in anatomy.layers.items():
        matrix, columns = read_matrix(model, layer), to_index(keep[name].columns)
        if layer.bias:
            columns = torch.cat([columns, columns.new_tensor([layer.columns])])
        matrix = matrix[to_index(keep[name].rows).to(matrix.device)][:, columns.to(matrix.device)]
        write_matrix(model, layer, keep[name], extents[name], matrix)
    narrow_heads(model, anatomy, keep)


def narrow_heads(model: nn.Module, anatomy: Anatomy, keep: Mapping[str, KeepMask]) -> None:
    """Fit modules that count their heads or experts, or the like, to matrices that have shrunk."""
    for part in anatomy.parts:
        for path, present in part.narrowed(keep):
            _narrow(model, path, present)
        narrow_attention(model, part.counts(keep), part.left(keep))
        part.narrow(model, keep)


def _narrow(model: nn.Module, path: str, present: Tensor) -> None:
    """Leave those entries of a parameter that are present, along its first axis."""
    parent_name, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_name)
    parameter: nn.Parameter = getattr(parent, name)
    # A dead head may come back to make up an equal number, so that the dense values are needed again.
    dense: dict[str, Tensor] = vars(parent).setdefault("dense_parameters", {})
    if name in dense or not bool(present.all()):
        values = dense.setdefault(name, parameter.detach())
        left = values[present.to(values.device)].to(parameter.device)
        setattr(parent, name, nn.Parameter(left, parameter.requires_grad))
        weights_of(model).settle(parent)


def _shape_of(module: nn.Module) -> dict[str, int | None]:
    """Arguments that rebuild a layer as it is now, as ``layer_shape`` gives them."""
    if isinstance(module, PrunedLinear):
        kept_in = None if module.input_index is None else len(module.input_index)
        kept_out = None if module.output_index is None else len(module.output_index)
    else:
        kept_in = kept_out = None
    linear = cast(nn.Linear, module)
    return {
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "kept_in": kept_in,
        "kept_out": kept_out,
    }


def check_finite(layer: LinearLayer, *costs: Tensor) -> None:
    """Make sure that a layer's costs can be compared.

    Raises:
        NonFiniteError: If a cost is NaN or infinite.
    """
    if not all(is_finite(cost) for cost in costs):
        raise NonFiniteError(
            f"The pruning costs of {layer.name} are not finite.",
            "Run with --precision float32 and --dtype float32, or use more calibration samples.",
        )


def check_written(layer: LinearLayer, core: nn.Linear) -> None:
    """Make sure that an update has left finite weights and bias, in the type that the layer stores.

    Raises:
        NonFiniteError: If a weight or the bias is NaN or infinite.
    """
    if not all(is_finite(part) for part in (core.weight, core.bias) if part is not None):
        raise NonFiniteError(
            f"The update of {layer.name} overflows in {core.weight.dtype}.".replace("torch.", ""),
            "Run with --dtype float32, or with larger --dampening-a and --dampening-g.",
        )
