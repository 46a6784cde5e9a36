"""A prunable linear layer as one matrix with its bias, and its physical replacement by a smaller one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llm_surgeon.export.modeling_pruned import PrunedLinear, shrink_linears
from llm_surgeon.models.family import Anatomy, LinearLayer, to_index
from llm_surgeon.selection import KeepMask


def read_matrix(model: nn.Module, layer: LinearLayer) -> Tensor:
    """Weights of the kept rows and columns, the bias as last column: ``[R, C]`` float32 (float64 stays)."""
    core = core_of(model, layer)
    weight, bias = core.weight.detach(), core.bias
    matrix = weight if bias is None else torch.cat([weight, bias.detach()[:, None]], dim=1)
    return matrix if matrix.dtype == torch.float64 else matrix.float()


def core_of(model: nn.Module, layer: LinearLayer) -> nn.Linear:
    """The module that holds the layer's weights."""
    module = model.get_submodule(layer.name)
    return module.core if isinstance(module, PrunedLinear) else module  # type: ignore[return-value]


def layer_shape(anatomy: Anatomy, layer: LinearLayer, keep: KeepMask) -> dict[str, int | None]:
    """The arguments that rebuild a pruned layer: see ``shrink_linears``.

    Along a narrow axis (neurons) the neighbours are as narrow as the matrix, and there is nothing to index.
    """
    rows, columns = int(keep.rows.sum()), int(keep.columns.sum())
    narrow_rows = (layer.name, "rows") in anatomy.narrow
    narrow_columns = (layer.name, "columns") in anatomy.narrow
    return {
        "in_features": columns if narrow_columns else layer.columns,
        "out_features": rows if narrow_rows else layer.rows,
        "kept_in": None if narrow_columns or columns == layer.columns else columns,
        "kept_out": None if narrow_rows or rows == layer.rows else rows,
    }


@torch.no_grad()
def write_matrix(model: nn.Module, anatomy: Anatomy, layer: LinearLayer, keep: KeepMask, matrix: Tensor) -> None:
    """Make a layer hold only ``matrix [kept rows, kept columns (+ bias)]``, in a smaller module if it has shrunk."""
    core = core_of(model, layer)
    if (len(matrix), matrix.shape[1] - layer.bias) != core.weight.shape:
        shrink_linears(model, {layer.name: layer_shape(anatomy, layer, keep)})
    module = model.get_submodule(layer.name)
    if isinstance(module, PrunedLinear):
        for index, mask in ((module.input_index, keep.columns), (module.output_index, keep.rows)):
            if index is not None:
                index.copy_(to_index(mask))
    core = core_of(model, layer)
    core.weight.copy_(matrix[:, : core.in_features])
    if layer.bias:
        core.bias.copy_(matrix[:, -1])
