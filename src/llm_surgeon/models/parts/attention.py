"""Attention: the rows and columns of its projections that are heads, and their dimensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llm_surgeon.mathematics.keep_masks import Axis, Coupling, KeepMask
from llm_surgeon.models.parts.part import (
    ChannelOrder,
    Part,
    PartEntry,
    Rows,
    channels_in,
    columns_of,
    has_module,
    rows_of,
)

# How the rows of queries, keys and values lie: each in a layer of their own; in one layer, all queries first, then
# all keys, then all values; in one layer, head by head (queries, keys and values of a head together).
Layout = Literal["separate", "stacked", "by head"]

# What an attribute of an attention module counts: query heads, key/value heads, query heads that share one of these,
# or the dimensions of all query heads.
Count = Literal["heads", "key/value heads", "shared", "width"]


@dataclass(frozen=True)
class Attention(PartEntry):
    """Names, within a block, of the attention and its linear layers.

    Heads are read from the configuration: ``num_attention_heads``, ``num_key_value_heads`` if it has them, and the
    head dimension from the width of the output matrix.

    Attributes:
        module: The attention itself, which is called with the hidden states and returns its output and something.
        query: The query projection.
        key: The key projection; the same name if it is one matrix with the queries.
        value: The value projection; the same name if it is one matrix with the queries.
        output: The output projection.
        rotary: Whether dimension d of a head is rotated together with d + rotated / 2, which ties the two; the number
            of rotated dimensions is read from the configuration.
        layout: How the rows of queries, keys and values lie.
        head_norms: Norms over the dimensions of each head of queries and keys. A dimension whose partner is dead
            still counts in the norm's denominator, so with them queries and keys do not die together.
        counts: Attributes of the module, and what of the heads they count: pruned attention has them set anew.
            ``config.NAME`` is an entry of the module's own configuration.
        free_heads: Whether the class builds itself with any number of heads from ``num_attention_heads``,
            ``num_key_value_heads`` and ``head_dim``, so that it needs no code of ours for fewer of them.
    """

    structures: ClassVar[tuple[str, ...]] = ("heads", "values")

    module: str
    query: str
    key: str
    value: str
    output: str
    rotary: bool
    layout: Layout = "separate"
    head_norms: tuple[str, ...] = ()
    counts: tuple[tuple[str, Count], ...] = ()
    free_heads: bool = True

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Queries, keys and values, and the output."""
        return self.readers, (self.output,)

    @property
    def readers(self) -> tuple[str, ...]:
        """Queries, keys and values."""
        return self.query, self.key, self.value

    @property
    def writers(self) -> tuple[str, ...]:
        """The output projection."""
        return (self.output,)

    @property
    def inside(self) -> tuple[str, ...]:
        """The norms of heads."""
        return self.head_norms

    @property
    def emptied(self) -> str:
        """The output projection's name within the attention."""
        return self.output.removeprefix(f"{self.module}.")

    @property
    def fixed(self) -> str | None:
        """The reason why there cannot be fewer heads, if so."""
        return None if self.free_heads else "computes the width of a head from the number of heads"

    def locate(self, config: Any, block: nn.Module, number: int, prefix: str) -> AttentionPart | None:
        """Find the heads of a block; None if the block has no attention."""
        if not has_module(block, self.module):
            return None
        heads = config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        columns = channels_in(block, self.output)
        shape = kv, heads // kv, columns // heads
        query, key, value = self._head_rows(*shape)
        return AttentionPart(
            entry=self,
            block=number,
            prefix=prefix,
            query=Rows(prefix + self.query, query),
            key=Rows(prefix + self.key, key),
            value=Rows(prefix + self.value, value),
            output=Rows(prefix + self.output, torch.arange(columns).view(shape)),
            rotated=_rotated(config, shape[2]) if self.rotary else 0,
        )

    def _head_rows(self, kv: int, shared: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of queries ``[kv, shared, width]``, keys and values ``[kv, width]`` in their layers."""
        queries, keys = kv * shared * width, kv * width
        if self.layout == "by head":
            # No family with this layout shares keys.
            query, key, value = torch.arange(3 * queries).view(kv * shared, 3, width).unbind(1)
            return query.reshape(kv, shared, width), key, value
        query, key = torch.arange(queries).view(kv, shared, width), torch.arange(keys).view(kv, width)
        stacked = self.layout == "stacked"
        return query, key + stacked * queries, key + stacked * (queries + keys)


def _rotated(config: Any, width: int) -> int:
    """Dimensions that are rotated: all, or a share of them from the first on."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(width * parameters.get("partial_rotary_factor", 1.0))


@dataclass(frozen=True)
class AttentionPart(Part):
    """The heads of one block, in the coordinates of the dense model.

    Attributes:
        entry: The names of the layers.
        block: Number of the block.
        prefix: What the names of the block's modules begin with.
        query: Rows ``[kv heads, query heads of each, width]``.
        key: Rows ``[kv heads, width]``.
        value: Rows ``[kv heads, width]``.
        output: Columns ``[kv heads, query heads of each, width]``.
        rotated: Dimensions of a head that rotary embeddings rotate.
    """

    entry: Attention
    block: int
    prefix: str
    query: Rows
    key: Rows
    value: Rows
    output: Rows
    rotated: int

    @property
    def module(self) -> str:
        """Path of the attention."""
        return self.prefix + self.entry.module

    @property
    def kv(self) -> int:
        """Key/value heads."""
        return self.query.index.shape[0]

    @property
    def shared(self) -> int:
        """Query heads that share one of the key/value heads."""
        return self.query.index.shape[1]

    @property
    def width(self) -> int:
        """Dimensions of a head."""
        return self.query.index.shape[2]

    def couplings(self) -> Iterator[Coupling]:
        """What dies together, from single dimensions to the whole attention.

        A value row feeds the same column of every query head that shares its key/value head. A query dimension meets
        the key dimension of the same number; rotary embeddings rotate two dimensions into each other, so both of the
        pair have to be dead. If the output projection reads nothing of a query head, its queries are without effect;
        if it reads nothing of all that share a key/value head, neither are the keys and values.
        """
        query, key, value, output = (rows.index for rows in (self.query, self.key, self.value, self.output))
        yield Coupling(
            "value dimension",
            (
                rows_of(self.value, value.reshape(-1, 1)),
                columns_of(self.output, output.transpose(1, 2).flatten(0, 1)),
            ),
            structure="values",
        )
        yield Coupling(
            "query head",
            (columns_of(self.output, output.flatten(0, 1)),),
            followers=(rows_of(self.query, query.flatten(0, 1)),),
            pools=torch.arange(self.kv).repeat_interleave(self.shared),
            structure="heads",
        )
        yield Coupling(
            "key/value group",
            (columns_of(self.output, output.flatten(1)), rows_of(self.value, value)),
            followers=(rows_of(self.query, query.flatten(1)), rows_of(self.key, key)),
            structure="heads",
        )
        yield Coupling(
            "attention",
            (columns_of(self.output, output.reshape(1, -1)), rows_of(self.value, value.reshape(1, -1))),
            followers=(rows_of(self.query, query.reshape(1, -1)), rows_of(self.key, key.reshape(1, -1))),
            structure="blocks",
        )
        # With norms of heads, queries and keys do not die together.
        if not self.entry.head_norms:
            yield from self._query_key_couplings()

    def _query_key_couplings(self) -> Iterator[Coupling]:
        """Pairs of rotated dimensions, and single dimensions that are not rotated."""
        half = self.rotated // 2
        pairs = torch.stack([torch.arange(half), torch.arange(half) + half], dim=1)
        single = torch.arange(self.rotated, self.width).view(-1, 1)
        for kind, dimensions in (("query/key pair", pairs), ("query/key dimension", single)):
            if len(dimensions):
                query = self.query.index[:, :, dimensions].transpose(1, 2).flatten(2).flatten(0, 1)
                key = self.key.index[:, dimensions].flatten(0, 1)
                yield Coupling(kind, (rows_of(self.query, query), rows_of(self.key, key)))

    def present_heads(self, keep: Mapping[str, KeepMask]) -> Tensor:
        """Query heads that the attention has to have, ``[kv heads, query heads of each]``; none if none is read.

        Attention needs equally many query heads for each key/value head. Where dead heads leave unequal numbers, some
        of the dead stay, with outputs that nothing reads.
        """
        alive = keep[self.output.layer].columns[self.output.index].any(2)
        most = int(alive.sum(1).max())
        # The living come first, and among the dead those that were first.
        chosen = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
        present = torch.zeros_like(alive).scatter_(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
        return present & alive.any(1, keepdim=True)

    def present(self, keep: Mapping[str, KeepMask]) -> Iterator[tuple[Rows, Axis, Tensor]]:
        """Dimensions of the heads that are left: dead heads narrow the attention."""
        heads = self.present_heads(keep)
        groups = heads.any(1)[:, None].expand(-1, self.width)
        queries = heads[:, :, None].expand(-1, -1, self.width)
        yield self.query, "rows", queries
        yield self.key, "rows", groups
        yield self.value, "rows", groups
        yield self.output, "columns", queries

    def counts(self, keep: Mapping[str, KeepMask]) -> dict[str, dict[str, int]]:
        """The attention's attributes that count heads, if it has fewer; none of them for an emptied one."""
        heads = self.present_heads(keep)
        if not bool(heads.any()):
            return {self.module: {}}
        if bool(heads.all()) or not self.entry.counts:
            return {}
        total, kv = int(heads.sum()), int(heads.any(1).sum())
        values: dict[Count, int] = {
            "heads": total,
            "key/value heads": kv,
            "shared": total // kv,
            "width": total * self.width,
        }
        return {self.module: {attribute: values[count] for attribute, count in self.entry.counts}}

    def sizes(self, keep: Mapping[str, KeepMask]) -> dict[str, int]:
        """Numbers of heads, and their width, which does not follow from the numbers any more."""
        heads = self.present_heads(keep)
        return {
            "num_attention_heads": int(heads.sum()),
            "num_key_value_heads": int(heads.any(1).sum()),
            "head_dim": self.width,
        }

    def gates(self, width: int | None) -> Iterator[tuple[Rows, Axis, int]]:
        """Outputs and queries of each head; to scale values or keys would have the same effects."""
        yield self.output, "columns", self.width
        yield self.query, "rows", self.width

    def orders(self) -> Iterator[ChannelOrder]:
        """The orders of the dimensions within value heads; each head has attention weights of its own."""
        yield ChannelOrder("dimensions of a head", self.output, (self.value,))

    def products(self, keep: Mapping[str, KeepMask]) -> int:
        """Dimensions of all query heads, in which a query meets a key, and a weight a value."""
        return int(self.present_heads(keep).sum()) * self.width
