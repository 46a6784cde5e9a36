"""The tensors of a GGUF file: names, shapes, and how each is made from the model when its turn to be written comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.export.gguf.architectures import Architecture
from llm_surgeon.export.gguf.parts import Block, Layer, Reader, has_bias, paths_of
from llm_surgeon.export.gguf.rope import Rope
from llm_surgeon.export.standard_layers import BlockWidths, head_width
from llm_surgeon.models.family import Family

# Neurons of zeros in a block without feed-forward part. The engine computes nothing more of a block without neurons,
# and drops its attention. 32 is the number that quantised rows need.
_IDLE_NEURONS = 32


@dataclass(frozen=True)
class Planned:
    """A tensor that is to be written.

    Attributes:
        name: Name in the file.
        shape: Shape, rows first.
        make: Function that makes it, in any type and on any device.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix that is multiplied, which may have fewer bits; tables of positions are none."""
        return len(self.shape) == 2 and self.name != "position_embd.weight"


def stored_widths(row: Architecture, blocks: list[Block]) -> list[BlockWidths]:
    """Widths of the blocks in the file, which has zeros for parts that are gone but have to be there.

    A head of zeros stands where the engine needs attention, and where the bias of the output projection is left.
    Neurons of zeros stand in every block without neurons.

    Args:
        row: The architecture.
        blocks: The blocks.
    """
    found = []
    for number, block in enumerate(blocks):
        widths = block.widths
        free = row.attention_free and number > 0 and "attn_output" not in block.output_biases
        if not widths.heads and not free:
            widths = replace(widths, heads=1, kv_heads=1)
        if not widths.neurons:
            widths = replace(widths, neurons=_IDLE_NEURONS)
        found.append(widths)
    return found


def plan_tensors(
    model: PreTrainedModel, family: Family, row: Architecture, rope: Rope | None, blocks: list[Block]
) -> list[Planned]:
    """The tensors of a file, in the order in which they are written.

    Args:
        model: The model.
        family: Entry of its architecture in transformers.
        row: Its architecture in llama.cpp.
        rope: Its rotary embeddings, if it has any.
        blocks: Its blocks.
    """
    planned = list(_outside(model, family, row))
    for name, divisors in (rope.factors if rope else {}).items():
        planned.append(Planned(name, tuple(divisors.shape), partial(_same, divisors)))
    share = rope.share if rope and row.neighbours else 0
    for number, (block, widths) in enumerate(zip(blocks, stored_widths(row, blocks), strict=True)):
        reader = Reader(family, model.config, block, widths, share, rope.rest if rope else 1.0)
        norms = _norms(model.config, family, row, block, widths)
        layers = _layers(row, family, model.config, block, widths, reader)
        planned += [replace(tensor, name=f"blk.{number}.{tensor.name}") for tensor in (*norms, *layers)]
    return planned


def _outside(model: PreTrainedModel, family: Family, row: Architecture) -> Iterator[Planned]:
    """Embeddings, last norm and output head."""
    residual = family.residual
    embedding = model.get_submodule(residual.tokens)
    yield _parameter("token_embd.weight", embedding, "weight")
    if residual.positions:
        yield _parameter("position_embd.weight", model.get_submodule(residual.positions), "weight")
    if residual.final_norm:
        yield from _norm("output_norm", model.get_submodule(residual.final_norm), row)
    head = model.get_output_embeddings()
    if row.head == "own" or head.weight is not embedding.weight:
        yield _parameter("output.weight", head, "weight")


def _norms(settings: Any, family: Family, row: Architecture, block: Block, widths: BlockWidths) -> Iterator[Planned]:
    """Norms of a block, without that of an attention that the file does not have, and norms of heads."""
    for name, path in zip(row.norms, family.residual.norms, strict=True):
        if widths.heads or name != "attn_norm":
            yield from _norm(name, block.module.get_submodule(path), row)
    if not row.head_norms:
        return
    for name, path in zip(("attn_q_norm", "attn_k_norm"), family.parts[0].inside, strict=True):
        if block.widths.heads:
            yield from _norm(name, block.module.get_submodule(path), row)
        else:
            # An emptied attention has no norms any more; those of zeros may be any.
            width = head_width(settings)
            yield Planned(f"{name}.weight", (width,), partial(torch.ones, width))


def _norm(name: str, module: nn.Module, row: Architecture) -> Iterator[Planned]:
    size = len(module.get_parameter("weight"))
    yield Planned(f"{name}.weight", (size,), partial(_shifted, module, row.norm_offset))
    if row.layer_norm:
        yield _parameter(f"{name}.bias", module, "bias")


def _shifted(norm: nn.Module, offset: float) -> Tensor:
    return norm.get_parameter("weight").detach().float() + offset


def _parameter(name: str, module: nn.Module, kind: str) -> Planned:
    parameter = module.get_parameter(kind).detach()
    return Planned(name, tuple(parameter.shape), partial(_same, parameter))


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class _Source:
    """Layers whose rows follow each other in one tensor.

    Attributes:
        rows: Rows of each.
        read: Function that reads a layer, by its kind.
    """

    rows: dict[str, int]
    read: Callable[[str], Layer]

    def weight(self) -> Tensor:
        """All rows of the matrices."""
        found = [self._weight(kind) for kind in self.rows]
        return found[0] if len(found) == 1 else torch.cat(found)

    def bias(self) -> Tensor:
        """All biases, zeros for layers without any."""
        found = []
        for kind, rows in self.rows.items():
            bias = self.read(kind)[1]
            found.append(torch.zeros(rows) if bias is None else bias.cpu())
        return torch.cat(found)

    def _weight(self, kind: str) -> Tensor:
        weight = self.read(kind)[0]
        assert weight is not None
        return weight.cpu()


def _layers(
    row: Architecture, family: Family, settings: Any, block: Block, widths: BlockWidths, reader: Reader
) -> Iterator[Planned]:
    """Matrices of a block with their biases."""
    hidden, width = settings.hidden_size, head_width(settings)
    queries, keys = widths.heads * width, widths.kv_heads * width
    biased = {kind for kind, path in paths_of(family) if has_bias(block.module, path)}
    qkv = {"attn_q": queries, "attn_k": keys, "attn_v": keys}
    groups = [("attn_qkv", qkv)] if row.stacked else [(kind, {kind: rows}) for kind, rows in qkv.items()]
    if widths.heads:
        for name, rows in groups:
            yield from _matrix(row, name, _Source(rows, reader.attention), hidden, biased)
        yield from _matrix(row, "attn_output", _Source({"attn_output": hidden}, reader.attention), queries, biased)
    gate = {"ffn_gate": widths.neurons} if row.gate != "none" else {}
    up = {"ffn_up": widths.neurons}
    for name, rows in (("ffn_up", gate | up),) if row.gate == "joined" else (("ffn_gate", gate), ("ffn_up", up)):
        if rows:
            yield from _matrix(row, name, _Source(rows, reader.feed_forward), hidden, biased)
    yield from _matrix(row, "ffn_down", _Source({"ffn_down": hidden}, reader.feed_forward), widths.neurons, biased)


def _matrix(row: Architecture, name: str, source: _Source, columns: int, biased: set[str]) -> Iterator[Planned]:
    rows = sum(source.rows.values())
    yield Planned(f"{name}.weight", (rows, columns), source.weight)
    if row.needs_biases or biased & source.rows.keys():
        yield Planned(f"{name}.bias", (rows,), source.bias)
