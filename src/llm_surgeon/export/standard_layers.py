"""A model in memory as standard layers: whole matrices, and the widths of each block.

Formats of serving engines know matrices of a block with fewer rows or columns, but no matrix that skips channels, and
no module that is not there. Here a pruned layer is put back to the shape that its neighbours expect, with zeros where
it has nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.models.family import Family
from llm_surgeon.models.modeling_pruned import NoLinear, PrunedLinear
from llm_surgeon.models.parts import Attention, FeedForward


@dataclass(frozen=True)
class BlockWidths:
    """Widths of one block.

    Attributes:
        heads: Number of query heads; 0 if the block has no attention left.
        kv_heads: Number of key/value heads; 0 if the block has no attention left.
        neurons: Number of neurons of the feed-forward part; 0 if the block has none left.
    """

    heads: int
    kv_heads: int
    neurons: int


def full_matrix(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The matrix ``[outputs, inputs]`` of a linear layer between tensors as wide as its neighbours, and its bias.

    Args:
        module: A linear layer, transposed (``Conv1D``), pruned, or emptied.

    Returns:
        Matrix and bias ``[outputs]``. The matrix is None if no weight is left, the bias is None if there is none.
    """
    if isinstance(module, NoLinear):
        return None, None if module.bias is None else module.bias.detach()
    if isinstance(module, Conv1D):
        return module.weight.detach().T, module.bias.detach()
    if not isinstance(module, PrunedLinear):
        linear = cast(nn.Linear, module)
        return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    weight: Tensor = module.core.weight.detach()
    bias = None if module.core.bias is None else module.core.bias.detach()
    if module.input_index is not None:
        wide = weight.new_zeros(weight.shape[0], module.in_features)
        weight = wide.index_copy(1, module.input_index, weight)
    if module.output_index is not None:
        weight = weight.new_zeros(module.out_features, weight.shape[1]).index_copy(0, module.output_index, weight)
    if bias is not None and module.output_index is not None:
        bias = bias.new_zeros(module.out_features).index_copy(0, module.output_index, bias)
    return weight, bias


def head_width(settings: Any) -> int:
    """Number of dimensions of an attention head, by the configuration of the model."""
    width: int = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    return width


def block_widths(model: PreTrainedModel, family: Family) -> tuple[BlockWidths, ...]:
    """Widths of the blocks of a dense or pruned model, read from the shapes of its layers.

    Args:
        model: The model in memory.
        family: Entry of its architecture, whose blocks are made of attention and feed-forward parts.
    """
    blocks = cast(nn.ModuleList, model.get_submodule(family.blocks))
    return tuple(_widths_of(block, family, head_width(model.config)) for block in blocks)


def _widths_of(block: nn.Module, family: Family, width: int) -> BlockWidths:
    heads = kv_heads = neurons = 0
    for entry in family.parts:
        output = _shape(block, entry.writers[0])
        if isinstance(entry, Attention) and output is not None:
            heads = output[1] // width
            keys = _shape(block, entry.key)
            rows = 0 if keys is None else keys[0]
            # In one matrix with the queries, keys and values have equally many rows.
            kv_heads = (rows if entry.layout == "separate" else (rows - heads * width) // 2) // width
        elif isinstance(entry, FeedForward) and output is not None:
            neurons = output[1]
    return BlockWidths(heads, kv_heads, neurons)


def _shape(block: nn.Module, name: str) -> tuple[int, int] | None:
    """Outputs and inputs of a linear layer of a block, as its neighbours see it; None if no weight is left of it."""
    try:
        module: Any = block.get_submodule(name)
    except AttributeError:
        return None
    if isinstance(module, NoLinear):
        return None
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape[1], module.weight.shape[0]
        return rows, columns
    return (module.out_features, module.in_features) if module.in_features else None
