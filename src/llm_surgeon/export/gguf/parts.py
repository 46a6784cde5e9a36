"""The parts of a model that a GGUF file has: blocks, widths, matrices and biases, read from the model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.standard_layers import BlockWidths, block_widths, full_matrix, head_width
from llm_surgeon.models.family import Family
from llm_surgeon.models.parts import Attention, FeedForward

# A matrix ``[outputs, inputs]`` and its bias; None where there is none.
Layer = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Block:
    """One block of a model, and what is left in it.

    Attributes:
        number: Its number in the model.
        module: The block.
        widths: Its widths; parts that are gone have none.
        output_biases: Kinds of the biases that a part adds to the residual stream, even without weights.
    """

    number: int
    module: nn.Module
    widths: BlockWidths
    output_biases: frozenset[str]

    @property
    def dead(self) -> bool:
        """Whether the block adds nothing to the residual stream."""
        return not (self.widths.heads or self.widths.neurons or self.output_biases)


def check_family(form: str, family: Family) -> None:
    """Make sure that a model is a language model alone, of blocks of an attention and a feed-forward part.

    Args:
        form: Name of the format, for the message.
        family: Entry of the architecture.

    Raises:
        ConfigError: If blocks have other parts, or the language model is one tower of several.
    """
    if family.text_config is not None:
        raise ConfigError(
            f"The format {form} has language models alone, and a model of type {family.model_type} has other towers.",
            "Leave the format out: --format hf takes every model.",
        )
    if [type(entry) for entry in family.parts] != [Attention, FeedForward]:
        raise ConfigError(
            f"The format {form} has attention and feed-forward parts only, and {family.model_type} has others.",
            "Leave the format out: --format hf takes every model.",
        )


def entries_of(family: Family) -> tuple[Attention, FeedForward]:
    """The entries of a family's attention and feed-forward part."""
    attention, feed_forward = family.parts
    return cast(Attention, attention), cast(FeedForward, feed_forward)


def blocks_of(model: PreTrainedModel, family: Family) -> list[Block]:
    """The blocks of a model that add something to the residual stream; the first one if none does."""
    modules = cast(nn.ModuleList, model.get_submodule(family.blocks))
    attention, feed_forward = entries_of(family)
    outputs = {"attn_output": attention.output, "ffn_down": feed_forward.output}
    widths = block_widths(model, family)
    blocks = [
        Block(
            number,
            module,
            widths[number],
            frozenset(kind for kind, path in outputs.items() if has_bias(module, path)),
        )
        for number, module in enumerate(modules)
    ]
    return [block for block in blocks if not block.dead] or blocks[:1]


def paths_of(family: Family) -> Iterator[tuple[str, str]]:
    """Kinds of layers by their tensors' names, and their paths in a block; layers in one matrix have one path."""
    attention, feed_forward = entries_of(family)
    yield from (("attn_q", attention.query), ("attn_k", attention.key), ("attn_v", attention.value))
    yield "attn_output", attention.output
    *gate, up = feed_forward.inputs
    yield from (("ffn_gate", path) for path in gate)
    yield from (("ffn_up", up), ("ffn_down", feed_forward.output))


def has_bias(block: nn.Module, path: str) -> bool:
    """Whether a layer of a block has a bias."""
    module: Any = block.get_submodule(path)
    bias = getattr(module, "core", module).bias
    return bias is not None and bias.numel() > 0


def biases_of(blocks: list[Block], family: Family) -> frozenset[str]:
    """Kinds of biases that any block has."""
    kinds = list(paths_of(family))
    return frozenset(kind for kind, path in kinds if any(has_bias(block.module, path) for block in blocks))


class Reader:
    """Matrices of a block as a GGUF file has them, with zeros for parts that are gone.

    Args:
        family: Entry of the model's architecture.
        settings: Configuration of the model.
        block: The block.
        widths: Widths that it is to have in the file; more than it has for a part that is gone.
        pairs: Number of dimensions of a head that are to be rotated as neighbours; 0 keeps their order.
        rest: Factor for queries and keys in the other dimensions.
    """

    def __init__(
        self, family: Family, settings: Any, block: Block, widths: BlockWidths, pairs: int = 0, rest: float = 1.0
    ) -> None:
        self._attention, self._feed_forward = entries_of(family)
        self._block, self._widths = block, widths
        self._hidden, self._width = settings.hidden_size, head_width(settings)
        self._order = _neighbouring(self._width, pairs) if pairs else None
        self._pairs, self._rest = pairs, rest

    def attention(self, kind: str) -> Layer:
        """Queries, keys or values (``attn_q``, ``attn_k``, ``attn_v``), or the output (``attn_output``)."""
        entry, real = self._attention, self._block.widths
        if kind == "attn_output":
            return self._output(entry.output, self._widths.heads * self._width, real.heads)
        heads = self._widths.heads if kind == "attn_q" else self._widths.kv_heads
        rows = heads * self._width
        if not real.heads:
            return torch.zeros(rows, self._hidden), None
        path = {"attn_q": entry.query, "attn_k": entry.key, "attn_v": entry.value}[kind]
        weight, bias = full_matrix(self._block.module.get_submodule(path))
        if weight is None:
            weight = torch.zeros(self._fused_rows(), self._hidden)
        weight = self._ordered(self._slice(weight, kind), kind, heads)
        return weight, None if bias is None else self._ordered(self._slice(bias, kind), kind, heads)

    def feed_forward(self, kind: str) -> Layer:
        """Gate, up or down (``ffn_gate``, ``ffn_up``, ``ffn_down``)."""
        entry, real, neurons = self._feed_forward, self._block.widths.neurons, self._widths.neurons
        if kind == "ffn_down":
            return self._output(entry.output, neurons, real)
        if not real:
            return torch.zeros(neurons, self._hidden), None
        weight, bias = full_matrix(self._block.module.get_submodule(entry.inputs[0 if kind == "ffn_gate" else -1]))
        joined = len(entry.inputs) == 2 and entry.inputs[0] == entry.inputs[1]
        rows = slice(neurons, None) if joined and kind == "ffn_up" else slice(0, neurons)
        if weight is None:
            return torch.zeros(neurons, self._hidden), None if bias is None else bias[rows]
        return weight[rows], None if bias is None else bias[rows]

    def _output(self, path: str, columns: int, left: int) -> Layer:
        weight, bias = full_matrix(self._block.module.get_submodule(path))
        return weight if left and weight is not None else torch.zeros(self._hidden, columns), bias

    def _fused_rows(self) -> int:
        heads, kv = self._widths.heads, self._widths.kv_heads
        return (heads + 2 * kv) * self._width

    def _slice(self, rows: Tensor, kind: str) -> Tensor:
        """Rows of one of queries, keys and values in their layer."""
        layout, width = self._attention.layout, self._width
        if layout == "separate":
            return rows
        which = ("attn_q", "attn_k", "attn_v").index(kind)
        if layout == "by head":
            by_head: Tensor = rows.unflatten(0, (-1, 3, width))
            return by_head[:, which].flatten(0, 1)
        queries, keys = self._widths.heads * width, self._widths.kv_heads * width
        start = (0, queries, queries + keys)[which]
        return rows[start : start + (keys if which else queries)]

    def _ordered(self, rows: Tensor, kind: str, heads: int) -> Tensor:
        """Rows of queries and keys in the order in which the architecture rotates them."""
        if self._order is None or kind == "attn_v":
            return rows
        by_head: Tensor = rows.unflatten(0, (heads, self._width))
        ordered = by_head[:, self._order.to(rows.device)]
        if self._rest != 1:
            # The order is a copy already, and float32 keeps the product as exact as it gets.
            ordered = ordered.float()
            ordered[:, self._pairs :] *= self._rest
        return ordered.flatten(0, 1)


def _neighbouring(width: int, rotated: int) -> Tensor:
    """Order of a head's dimensions in which those that are rotated together, d and d + half, are neighbours."""
    pairs = torch.arange(rotated).view(2, -1).T.flatten()
    return torch.cat([pairs, torch.arange(rotated, width)])
