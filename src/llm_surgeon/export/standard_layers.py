"""A model in memory as standard layers: the matrices and the widths of each block.

Formats of serving engines know blocks whose matrices have fewer rows and columns, but no matrix that skips channels.
Layers are told apart by what they have, not by their class: those of an export are of classes that the export brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import ConfigError
from llm_surgeon.models.family import Family
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
    """The matrix ``[outputs, inputs]`` of a linear layer, and its bias ``[outputs]``.

    Args:
        module: A linear layer, transposed (``Conv1D``) or emptied.

    Returns:
        Matrix and bias. The matrix is None if no weight is left, the bias is None if there is none.
    """
    core = _core(module)
    weight, bias = (getattr(core or module, name, None) for name in ("weight", "bias"))
    bias = None if bias is None else bias.detach()
    index = getattr(module, "output_index", None)
    if bias is not None and index is not None:
        bias = bias.new_zeros(module.out_features).scatter(0, index, bias)
    if weight is None or not weight.numel():
        return None, bias if bias is not None and len(bias) else None
    return (weight.detach().T if isinstance(module, Conv1D) else weight.detach()), bias


def _core(module: nn.Module) -> nn.Linear | None:
    """The matrix inside a layer that skips channels; None for other modules."""
    core = getattr(module, "core", None)
    return core if isinstance(core, nn.Linear) else None


def check_without_gaps(model: nn.Module, name: str) -> None:
    """Check that no layer of a model skips channels.

    Args:
        model: The model.
        name: Name of the format that cannot say such layers.

    Raises:
        ConfigError: If one does.
    """
    cores = ((path, _core(module)) for path, module in model.named_modules())
    first = next((path for path, core in cores if core is not None and core.weight.numel()), None)
    if first is not None:
        raise ConfigError(
            f"The format {name} has no matrices without some of their rows or columns, as {first} is one.",
            "Prune with --structure neurons+heads, or one of the two.",
        )


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
    """Outputs and inputs of a linear layer of a block; None if no weight is left of it."""
    try:
        module = block.get_submodule(name)
    except AttributeError:
        return None
    weight, _ = full_matrix(module)
    return None if weight is None else (weight.shape[0], weight.shape[1])
