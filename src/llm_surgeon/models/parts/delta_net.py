"""Gated delta nets: attention in linear time, whose heads each keep one matrix as their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llm_surgeon.mathematics.keep_masks import Axis, Coupling, KeepMask
from llm_surgeon.models.parts.part import (
    Part,
    PartEntry,
    Rows,
    channels_in,
    check_activation,
    columns_of,
    equally_many,
    has_module,
    rows_of,
)

# What a convolution with a filter for each channel counts channels by.
_CHANNELS = ("weight", "in_channels", "out_channels", "groups")


@dataclass(frozen=True)
class DeltaNet(PartEntry):
    """Names of a gated delta net's module and linear layers, within a block.

    Queries, keys and values come from one matrix, in this order, and pass a convolution over the last tokens, which
    has a filter of its own for each channel. The output of each head is normalised and multiplied by the activation of
    its gate. The numbers of heads, and the width of keys, are read from the configuration.

    Two projections with the same name are one matrix: for each key head it has the rows of both, one after the other.

    Attributes:
        module: The module, which is called with the hidden states and returns a tensor.
        query_key_value: The projection of queries, keys and values.
        gate: The projection of the gates of outputs; it may be that of queries, keys and values.
        strength: The projection of a number for each head: how strongly a token is written into the state.
        decay: The projection of a number for each head: how much of the state is forgotten; it may be the same as that
            of strengths.
        output: The output projection.
        convolution: The convolution, with a filter for each row of queries, keys and values.
        norm: The norm of heads.
        of_heads: Names, within the module, of parameters with a number for each head.
        activation: Entry of the configuration that names the activation behind the convolution.
    """

    structures: ClassVar[tuple[str, ...]] = ("heads", "values")

    module: str
    query_key_value: str
    gate: str
    strength: str
    decay: str
    output: str
    convolution: str
    norm: str
    of_heads: tuple[str, ...] = ("A_log", "dt_bias")
    activation: str = "hidden_act"

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """The projections that read the stream, and the output projection."""
        return self.readers, (self.output,)

    @property
    def readers(self) -> tuple[str, ...]:
        """The projections of queries, keys and values, of gates, and of the two numbers for each head."""
        return tuple(dict.fromkeys((self.query_key_value, self.gate, self.strength, self.decay)))

    @property
    def writers(self) -> tuple[str, ...]:
        """The output projection."""
        return (self.output,)

    @property
    def inside(self) -> tuple[str, ...]:
        """The other modules, and the module itself, which has parameters of its own."""
        return self.module, self.convolution, self.norm

    @property
    def emptied(self) -> str:
        """Name of the output projection within the module."""
        return self.output.removeprefix(f"{self.module}.")

    @property
    def returns_tuple(self) -> bool:
        """False: the module returns its output."""
        return False

    def check(self, config: Any, model_type: str) -> None:
        """Check that a dead row has no effect behind the convolution, which has no biases.

        Raises:
            UnsupportedModelError: If the activation does not map 0 to 0.
        """
        check_activation(config, self.activation, model_type)

    def locate(self, config: Any, block: nn.Module, number: int, prefix: str) -> DeltaNetPart | None:
        """Find the heads of a block; None if the block has no delta net."""
        if not has_module(block, self.module):
            return None
        groups, heads = config.linear_num_key_heads, config.linear_num_value_heads
        columns = channels_in(block, self.output)
        shared, size, width = heads // groups, config.linear_key_head_dim, columns // heads
        values = torch.arange(columns).view(groups, shared, width)
        numbers = torch.arange(heads).view(groups, shared)
        if self.gate == self.query_key_value:
            per_group = torch.arange(2 * (groups * size + columns)).view(groups, -1)
            query, key, value, gate = per_group.split((size, size, shared * width, shared * width), dim=1)
            value, gate = value.reshape(values.shape), gate.reshape(values.shape)
        else:
            query = torch.arange(groups * size).view(groups, size)
            key, value, gate = query + query.numel(), values + 2 * query.numel(), values
        strength = decay = numbers
        if self.decay == self.strength:
            strength, decay = torch.arange(2 * heads).view(groups, -1).chunk(2, dim=1)
        return DeltaNetPart(
            entry=self,
            block=number,
            prefix=prefix,
            query=Rows(prefix + self.query_key_value, query),
            key=Rows(prefix + self.query_key_value, key),
            value=Rows(prefix + self.query_key_value, value),
            gate=Rows(prefix + self.gate, gate),
            strength=Rows(prefix + self.strength, strength),
            decay=Rows(prefix + self.decay, decay),
            output=Rows(prefix + self.output, values),
        )


@dataclass(frozen=True)
class DeltaNetPart(Part):
    """The heads of one block's delta net, in the coordinates of the dense model.

    Attributes:
        entry: Names of the layers.
        block: Number of the block.
        prefix: Beginning of the names of the block's modules.
        query: Rows ``[key heads, width of keys]`` of the queries, which have as many heads as the keys.
        key: Rows ``[key heads, width of keys]`` of the keys.
        value: Rows ``[key heads, value heads of each, width]`` of the values.
        gate: Rows ``[key heads, value heads of each, width]`` of the gates.
        strength: Rows ``[key heads, value heads of each]`` of the strengths.
        decay: Rows ``[key heads, value heads of each]`` of the decays.
        output: Columns ``[key heads, value heads of each, width]`` of the output projection.
    """

    entry: DeltaNet
    block: int
    prefix: str
    query: Rows
    key: Rows
    value: Rows
    gate: Rows
    strength: Rows
    decay: Rows
    output: Rows

    @property
    def module(self) -> str:
        """Path of the module."""
        return self.prefix + self.entry.module

    @property
    def groups(self) -> int:
        """Number of key heads."""
        return self.output.index.shape[0]

    @property
    def shared(self) -> int:
        """Number of value heads that share a key head."""
        return self.output.index.shape[1]

    def couplings(self) -> Iterator[Coupling]:
        """Couplings of rows and columns, from single dimensions to the whole delta net.

        A dead gate row makes a gate of zero, so that its column reads nothing. So does a dead value row, but not the
        other way round: a value that no column reads still counts in the norm of its head. Likewise queries and keys do
        not die together, as each is normalised. A head whose values, or gates, are all dead puts out zero, and so do
        all heads that share dead queries, or keys. Strengths and decays kill nothing: of a dead row, the head still
        writes and forgets at a rate of its own.
        """
        gates, columns = (rows.index.reshape(-1, 1) for rows in (self.gate, self.output))
        dimension = rows_of(self.gate, gates), columns_of(self.output, columns)
        yield Coupling("gated dimension", dimension, structure="values")
        yield Coupling(
            "normed value dimension",
            (rows_of(self.value, self.value.index.reshape(-1, 1)),),
            followers=dimension,
            structure="values",
        )
        yield self._heads("value head", self.groups * self.shared, "heads")
        yield self._heads("key head", self.groups, "heads", self.query, self.key)
        yield self._heads("delta net", 1, "blocks", self.query, self.key)

    def _heads(self, kind: str, count: int, structure: str, *read: Rows) -> Coupling:
        """Coupling of whole heads.

        Args:
            kind: Kind of the coupling.
            count: Number of groups that all heads make up.
            structure: Structure of a recipe that removes such groups.
            read: Rows beside those of value heads that belong to a group as a whole.
        """

        def grouped(rows: Rows) -> Tensor:
            return rows.index.reshape(count, -1)

        sides = (rows_of(rows, grouped(rows)) for rows in (self.value, self.gate, *read))
        return Coupling(
            kind,
            (columns_of(self.output, grouped(self.output)), *sides),
            followers=tuple(rows_of(rows, grouped(rows)) for rows in (self.strength, self.decay)),
            # Each key head keeps equally many value heads.
            pools=None if read else torch.arange(self.groups).repeat_interleave(self.shared),
            structure=structure,
        )

    def present_heads(self, keep: Mapping[str, KeepMask]) -> Tensor:
        """Value heads that the delta net has to have, bool ``[key heads, value heads of each]``; none if none is read.

        Equally many value heads share a key head, so that some dead heads may stay.
        """
        return equally_many(keep[self.output.layer].columns[self.output.index].any(2))

    def present(self, keep: Mapping[str, KeepMask]) -> Iterator[tuple[Rows, Axis, Tensor]]:
        """Rows and columns of the heads that the delta net still has: dead heads narrow it."""
        heads = self.present_heads(keep)
        for rows in (self.query, self.key):
            yield rows, "rows", heads.any(1)[:, None].expand_as(rows.index)
        for rows in (self.value, self.gate):
            yield rows, "rows", heads[:, :, None].expand_as(rows.index)
        for rows in (self.strength, self.decay):
            yield rows, "rows", heads
        yield self.output, "columns", heads[:, :, None].expand_as(self.output.index)

    def narrowed(self, keep: Mapping[str, KeepMask]) -> Iterator[tuple[str, Tensor]]:
        """The filters of the convolution, and the numbers of heads."""
        heads = self.present_heads(keep)
        if bool(heads.any()):
            # Filters come in this order, however the rows of the matrix are arranged.
            keys = heads.any(1)[:, None].expand_as(self.query.index).flatten()
            channels = torch.cat([keys, keys, heads[:, :, None].expand_as(self.value.index).flatten()])
            yield f"{self.prefix}{self.entry.convolution}.weight", channels
            for name in self.entry.of_heads:
                yield f"{self.module}.{name}", heads.flatten()

    def counts(self, keep: Mapping[str, KeepMask]) -> dict[str, dict[str, int]]:
        """Attributes of the delta net that count heads, if it has fewer heads; no attributes if it is emptied."""
        heads = self.present_heads(keep)
        if not bool(heads.any()):
            return {self.module: {}}
        if bool(heads.all()):
            return {}
        groups, total = int(heads.any(1).sum()), int(heads.sum())
        keys, values = groups * self.query.index.shape[1], total * self.value.index.shape[2]
        convolution = self.entry.convolution.removeprefix(f"{self.entry.module}.")
        channels = {f"{convolution}.{name}": 2 * keys + values for name in _CHANNELS}
        dims = {"key_dim": keys, "value_dim": values, "conv_dim": 2 * keys + values}
        counts = {"num_k_heads": groups, "num_v_heads": total, **dict.fromkeys(self.entry.of_heads, total)}
        return {self.module: {**counts, **dims, **channels}}

    def sizes(self, keep: Mapping[str, KeepMask]) -> dict[str, int]:
        """Entries for the numbers of heads."""
        heads = self.present_heads(keep)
        return {"linear_num_key_heads": int(heads.any(1).sum()), "linear_num_value_heads": int(heads.sum())}

    def gates(self, width: int | None) -> Iterator[tuple[Rows, Axis, int]]:
        """Gates on outputs and on the gates of each head; norms undo gates on values, and nearly those on queries."""
        size = self.output.index.shape[2]
        yield self.output, "columns", size
        yield self.gate, "rows", size
