"""Attention parts: the rows and columns of the projections that make up heads and their dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    equally_many,
    has_module,
    rows_of,
)

# Layout of the rows of queries, keys and values. "separate": in three layers. "stacked": in one layer, all queries
# first, then all keys, then all values. "by head": in one layer, queries, keys and values of a head together.
Layout = Literal["separate", "stacked", "by head"]

# Meaning of an attribute of an attention module: the number of query heads, of key/value heads, of query heads that
# share a key/value head, or of the dimensions of all query heads.
Count = Literal["heads", "key/value heads", "shared", "width"]


@dataclass(frozen=True)
class Attention(PartEntry):
    """Names of an attention part's module and linear layers, within a block.

    The numbers of heads are read from the configuration (``num_attention_heads``, and ``num_key_value_heads`` if it has
    that), the head dimension from the width of the output matrix.

    Attributes:
        module: The attention module, which is called with the hidden states and returns a tuple, its output first.
        query: The query projection.
        key: The key projection; the query projection's name if they are one matrix.
        value: The value projection; the query projection's name if they are one matrix.
        output: The output projection.
        rotary: Whether two dimensions of a head are rotated together, which ties the two: d and d + rotated / 2. The
            number of rotated dimensions is read from the configuration.
        layout: Layout of the rows of queries, keys and values.
        head_norms: Norms over the dimensions of each head of queries and keys. A dimension whose partner is dead still
            counts in the norm's denominator, so queries and keys do not die together if there are such norms.
        counts: Attributes of the module that count heads or dimensions, and the meaning of each. They are set anew when
            the attention is pruned. ``config.NAME`` is an entry of the module's own configuration.
        sinks: Name, within the module, of a parameter with a number for each query head, optional.
        free_heads: Whether the class can be built with any number of heads from ``num_attention_heads``,
            ``num_key_value_heads`` and ``head_dim``, so that fewer heads need no modelling file. Other classes compute
            the width of a head from the number of heads, or take the hidden size for that of all heads.
        interleaved: Whether neighbours are rotated together instead, 2 d and 2 d + 1.
        gated: Whether the sigmoid of further rows of the query projection multiplies what the output projection reads.
            The gates of a head follow its queries. The layout is then "separate".
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
    sinks: str | None = None
    interleaved: bool = False
    gated: bool = False

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """The projections of queries, keys and values, and the output projection."""
        return self.readers, (self.output,)

    @property
    def readers(self) -> tuple[str, ...]:
        """The projections of queries, keys and values."""
        return self.query, self.key, self.value

    @property
    def writers(self) -> tuple[str, ...]:
        """The output projection."""
        return (self.output,)

    @property
    def inside(self) -> tuple[str, ...]:
        """Norms over the dimensions of heads, and the module itself if it has parameters of its own."""
        return self.head_norms if self.sinks is None else (*self.head_norms, self.module)

    @property
    def emptied(self) -> str:
        """Name of the output projection within the attention module."""
        return self.output.removeprefix(f"{self.module}.")

    @property
    def counts_tokens(self) -> bool:
        """True: keys and values of all tokens are cached."""
        return True

    @property
    def fixed(self) -> str | None:
        """Reason why the transformers class cannot be built with fewer heads; None if it can be."""
        return None if self.free_heads else "ties the number of heads to the hidden size"

    def locate(self, config: Any, block: nn.Module, number: int, prefix: str) -> AttentionPart | None:
        """Find the heads of a block; None if the block has no attention."""
        if not has_module(block, self.module):
            return None
        heads = config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        columns = channels_in(block, self.output)
        shape = kv, heads // kv, columns // heads
        query, key, value, gate = self._head_rows(*shape)
        return AttentionPart(
            entry=self,
            block=number,
            prefix=prefix,
            query=Rows(prefix + self.query, query),
            key=Rows(prefix + self.key, key),
            value=Rows(prefix + self.value, value),
            output=Rows(prefix + self.output, torch.arange(columns).view(shape)),
            gate=None if gate is None else Rows(prefix + self.query, gate),
            rotated=_rotated(config, shape[2]) if self.rotary else 0,
        )

    def _head_rows(self, kv: int, shared: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Rows of queries ``[kv, shared, width]``, keys, values ``[kv, width]`` and gates, as queries, in their layers.

        There are no rows of gates if queries are not gated.
        """
        queries, keys = kv * shared * width, kv * width
        if self.layout == "by head":
            # No family with this layout shares keys.
            query, key, value = torch.arange(3 * queries).view(kv * shared, 3, width).unbind(1)
            return query.reshape(kv, shared, width), key, value, None
        if self.gated:
            query, gate = torch.arange(2 * queries).view(kv, shared, 2, width).unbind(2)
            key = torch.arange(keys).view(kv, width)
            return query, key, key, gate
        query, key = torch.arange(queries).view(kv, shared, width), torch.arange(keys).view(kv, width)
        stacked = self.layout == "stacked"
        return query, key + stacked * queries, key + stacked * (queries + keys), None


def _rotated(config: Any, width: int) -> int:
    """Number of dimensions of a head that are rotated, from the first on: all of them, or a share."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return int(width * parameters.get("partial_rotary_factor", 1.0))


@dataclass(frozen=True)
class AttentionPart(Part):
    """The heads of one block, in the coordinates of the dense model.

    Attributes:
        entry: Names of the layers.
        block: Number of the block.
        prefix: Beginning of the names of the block's modules.
        query: Rows ``[kv heads, query heads of each, width]`` of the queries.
        key: Rows ``[kv heads, width]`` of the keys.
        value: Rows ``[kv heads, width]`` of the values.
        output: Columns ``[kv heads, query heads of each, width]`` of the output projection.
        rotated: Number of dimensions of a head that rotary embeddings rotate.
        gate: Rows of the gates, as those of the queries; None if there are no gates.
    """

    entry: Attention
    block: int
    prefix: str
    query: Rows
    key: Rows
    value: Rows
    output: Rows
    rotated: int
    gate: Rows | None = None

    @property
    def module(self) -> str:
        """Path of the attention module."""
        return self.prefix + self.entry.module

    @property
    def kv(self) -> int:
        """Number of key/value heads."""
        return self.query.index.shape[0]

    @property
    def shared(self) -> int:
        """Number of query heads that share a key/value head."""
        return self.query.index.shape[1]

    @property
    def width(self) -> int:
        """Number of dimensions of a head."""
        return self.query.index.shape[2]

    @property
    def query_and_gate(self) -> Rows:
        """Rows ``[kv heads, query heads of each, width]`` of the queries; twice the width with those of the gates."""
        gates = [] if self.gate is None else [self.gate.index]
        return Rows(self.query.layer, torch.cat([self.query.index, *gates], dim=2))

    def couplings(self) -> Iterator[Coupling]:
        """Couplings of rows and columns, from single dimensions to the whole attention.

        A value row feeds the same column of every query head that shares its key/value head. A query dimension meets
        the key dimension of the same number. Rotary embeddings rotate two dimensions into each other, so both of the
        pair have to be dead. If the output projection reads nothing of a query head, the head's queries have no effect.
        If it reads nothing of all query heads that share a key/value head, the keys and values have none either.
        """
        every = self.query_and_gate, self.key, self.value, self.output
        query, key, value, output = (rows.index for rows in every)
        gates = [] if self.gate is None else [self.gate]
        yield Coupling(
            "value dimension",
            (
                rows_of(self.value, value.reshape(-1, 1)),
                columns_of(self.output, output.transpose(1, 2).flatten(0, 1)),
            ),
            followers=tuple(rows_of(rows, rows.index.transpose(1, 2).flatten(0, 1)) for rows in gates),
            structure="values",
        )
        # The gate of a dead row is one half, so that its column still counts.
        for rows in gates:
            columns = columns_of(self.output, output.reshape(-1, 1))
            yield Coupling("gate", (columns,), followers=(rows_of(rows, rows.index.reshape(-1, 1)),))
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
        """Couplings of queries with keys: pairs of rotated dimensions, and single dimensions that are not rotated."""
        rotated = torch.arange(self.rotated // 2 * 2)
        pairs = rotated.view(-1, 2) if self.entry.interleaved else rotated.view(2, -1).T
        single = torch.arange(self.rotated, self.width).view(-1, 1)
        for kind, dimensions in (("query/key pair", pairs), ("query/key dimension", single)):
            if len(dimensions):
                query = self.query.index[:, :, dimensions].transpose(1, 2).flatten(2).flatten(0, 1)
                key = self.key.index[:, dimensions].flatten(0, 1)
                yield Coupling(kind, (rows_of(self.query, query), rows_of(self.key, key)))

    def present_heads(self, keep: Mapping[str, KeepMask]) -> Tensor:
        """Query heads that the attention has to have, bool ``[kv heads, query heads of each]``; none if none is read.

        Attention needs equally many query heads for each key/value head. Where dead heads leave unequal numbers, some
        of the dead heads stay, and nothing reads their outputs.
        """
        return equally_many(keep[self.output.layer].columns[self.output.index].any(2))

    def present(self, keep: Mapping[str, KeepMask]) -> Iterator[tuple[Rows, Axis, Tensor]]:
        """Dimensions of heads that the attention still has: dead heads narrow it."""
        heads = self.present_heads(keep)
        groups = heads.any(1)[:, None].expand(-1, self.width)
        queries = heads[:, :, None].expand(-1, -1, self.width)
        yield self.query_and_gate, "rows", heads[:, :, None].expand_as(self.query_and_gate.index)
        yield self.key, "rows", groups
        yield self.value, "rows", groups
        yield self.output, "columns", queries

    def counts(self, keep: Mapping[str, KeepMask]) -> dict[str, dict[str, int]]:
        """Attributes of the attention that count heads, if it has fewer heads; no attributes if it is emptied."""
        heads = self.present_heads(keep)
        if not bool(heads.any()):
            return {self.module: {}}
        if bool(heads.all()) or not self.entry.counts:
            return {}
        sinks = {} if self.entry.sinks is None else {self.entry.sinks: int(heads.sum())}
        total, kv = int(heads.sum()), int(heads.any(1).sum())
        values: dict[Count, int] = {
            "heads": total,
            "key/value heads": kv,
            "shared": total // kv,
            "width": total * self.width,
        }
        return {self.module: {attribute: values[count] for attribute, count in self.entry.counts} | sinks}

    def narrowed(self, keep: Mapping[str, KeepMask]) -> Iterator[tuple[str, Tensor]]:
        """The sinks of heads that are present."""
        if self.entry.sinks is not None:
            yield f"{self.module}.{self.entry.sinks}", self.present_heads(keep).flatten()

    def sizes(self, keep: Mapping[str, KeepMask]) -> dict[str, int]:
        """Entries for the numbers of heads, and for their width, which the numbers of heads no longer determine."""
        heads = self.present_heads(keep)
        return {
            "num_attention_heads": int(heads.sum()),
            "num_key_value_heads": int(heads.any(1).sum()),
            "head_dim": self.width,
        }

    def widths(self, accepted: Callable[[Mapping[str, int]], bool]) -> dict[str, frozenset[int]]:
        """Numbers of key/value heads, and of query heads of each, any of which together are accepted.

        Of the two largest sets of that kind, one begins with the key/value heads, the other with the query heads.
        """

        def fits(kv: int, shared: int) -> bool:
            whole = (kv, shared) == (self.kv, self.shared)
            sizes = {"num_attention_heads": kv * shared, "num_key_value_heads": kv, "head_dim": self.width}
            return whole or accepted(sizes)

        groups, queries = range(1, self.kv + 1), range(1, self.shared + 1)
        first_groups = [kv for kv in groups if fits(kv, self.shared)]
        then_queries = [shared for shared in queries if all(fits(kv, shared) for kv in first_groups)]
        first_queries = [shared for shared in queries if fits(self.kv, shared)]
        then_groups = [kv for kv in groups if all(fits(kv, shared) for shared in first_queries)]
        choices = (first_groups, then_queries), (then_groups, first_queries)
        left_groups, left_queries = max(choices, key=lambda choice: len(choice[0]) * len(choice[1]))
        return {"key/value group": frozenset(left_groups), "query head": frozenset(left_queries)}

    def gates(self, width: int | None) -> Iterator[tuple[Rows, Axis, int]]:
        """Gates on outputs and on queries of each head; gates on values and keys would only repeat these."""
        yield self.output, "columns", self.width
        yield self.query, "rows", self.width

    def orders(self) -> Iterator[ChannelOrder]:
        """Orders of the dimensions within value heads; each head has attention weights of its own."""
        gates = () if self.gate is None else self.gate.index.unbind(1)
        writers = self.value, *(Rows(self.query.layer, index) for index in gates)
        yield ChannelOrder("dimensions of a head", self.output, writers)

    def products(self, keep: Mapping[str, KeepMask]) -> int:
        """Number of dimensions of all query heads: each multiplies a query with a key, and a weight with a value."""
        return int(self.present_heads(keep).sum()) * self.width
