"""Attention and feed-forward part of a block: which rows and columns of its layers are which head or neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.family import Attention, FeedForward


@dataclass(frozen=True)
class Rows:
    """Some rows, or columns, of one layer: ``index`` may have any shape."""

    layer: str
    index: Tensor


@dataclass(frozen=True)
class AttentionPart:
    """The heads of one block, in the coordinates of the dense model.

    Attributes:
        module: Path of the attention.
        block: Number of its block.
        query: Rows ``[kv heads, query heads of each, width]``.
        key: Rows ``[kv heads, width]``.
        value: Rows ``[kv heads, width]``.
        output: Columns ``[kv heads, query heads of each, width]``.
        rotated: Dimensions of a head that rotary embeddings rotate.
    """

    module: str
    block: int
    query: Rows
    key: Rows
    value: Rows
    output: Rows
    rotated: int

    @property
    def kv(self) -> int:
        """Key/value heads."""
        return self.query.index.shape[0]

    @property
    def shared(self) -> int:
        """Query heads that share one of them."""
        return self.query.index.shape[1]

    @property
    def width(self) -> int:
        """Dimensions of a head."""
        return self.query.index.shape[2]

    @property
    def layers(self) -> tuple[str, ...]:
        """Its layers, each once."""
        return tuple(dict.fromkeys(rows.layer for rows in (self.query, self.key, self.value, self.output)))


@dataclass(frozen=True)
class FeedForwardPart:
    """The neurons of one block, in the coordinates of the dense model.

    Attributes:
        block: Number of its block.
        inputs: Rows ``[neurons]`` of each input.
        output: Columns ``[neurons]``.
    """

    block: int
    inputs: tuple[Rows, ...]
    output: Rows

    @property
    def neurons(self) -> int:
        """How many there are."""
        return len(self.output.index)

    @property
    def layers(self) -> tuple[str, ...]:
        """Its layers, each once."""
        return tuple(dict.fromkeys(rows.layer for rows in (*self.inputs, self.output)))


def attention_part(config: Any, attention: Attention, block: nn.Module, number: int, prefix: str) -> AttentionPart:
    """The heads of one block of a dense model, see ``Attention``."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    columns = _inputs(block, attention.output)
    shape = kv, heads // kv, columns // heads
    query, key, value = _head_rows(attention, *shape)
    return AttentionPart(
        module=prefix + attention.module,
        block=number,
        query=Rows(prefix + attention.query, query),
        key=Rows(prefix + attention.key, key),
        value=Rows(prefix + attention.value, value),
        output=Rows(prefix + attention.output, torch.arange(columns).view(shape)),
        rotated=_rotated(config, shape[2]) if attention.rotary else 0,
    )


def _head_rows(attention: Attention, kv: int, shared: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries ``[kv, shared, width]``, keys and values ``[kv, width]`` in their layers."""
    queries, keys = kv * shared * width, kv * width
    if attention.layout == "by head":
        # No family with this layout shares keys.
        query, key, value = torch.arange(3 * queries).view(kv * shared, 3, width).unbind(1)
        return query.reshape(kv, shared, width), key, value
    query, key = torch.arange(queries).view(kv, shared, width), torch.arange(keys).view(kv, width)
    stacked = attention.layout == "stacked"
    return query, key + stacked * queries, key + stacked * (queries + keys)


def _rotated(config: Any, width: int) -> int:
    """Dimensions that are rotated: all, or a share of them from the first on."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(width * parameters.get("partial_rotary_factor", 1.0))


def _inputs(block: nn.Module, kind: str) -> int:
    """Inputs of a layer, which an entry to ignore may have left transposed."""
    module = block.get_submodule(kind)
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UnsupportedModelError(
            f"{kind} is a {type(module).__name__}, not a dense linear layer.",
            "Give the original checkpoint, neither pruned nor quantised.",
        )
    return module.nx if isinstance(module, Conv1D) else module.in_features


def feed_forward_part(feed_forward: FeedForward, block: nn.Module, number: int, prefix: str) -> FeedForwardPart:
    """The neurons of one block of a dense model, see ``FeedForward``."""
    count = _inputs(block, feed_forward.output)
    neurons, names = torch.arange(count), feed_forward.inputs
    # Of one matrix with the rows of several inputs, the rows of the second come after those of the first.
    inputs = tuple(Rows(prefix + name, neurons + names[:place].count(name) * count) for place, name in enumerate(names))
    return FeedForwardPart(number, inputs, Rows(prefix + feed_forward.output, neurons))
