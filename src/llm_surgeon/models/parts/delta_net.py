"""Gated delta nets: attention in linear time, whose heads each keep one matrix as their state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llm_surgeon.mathematics.keep_masks import Axis, Coupling
from llm_surgeon.models.parts.part import (
    Part,
    PartEntry,
    Rows,
    channels_in,
    check_activation,
    columns_of,
    has_module,
    rows_of,
)


@dataclass(frozen=True)
class DeltaNet(PartEntry):
    """Names of a gated delta net's module and linear layers, within a block.

    Queries, keys and values come from one matrix, in this order, and pass a convolution over the last tokens, which
    has a filter of its own for each channel. The output of each head is normalised and multiplied by the activation of
    its gate. The numbers of heads, and the width of keys, are read from the configuration.

    Single heads stay: the convolution and two vectors of parameters would have to become narrower with them.

    Attributes:
        module: The module, which is called with the hidden states and returns a tensor.
        query_key_value: The projection of queries, keys and values.
        gate: The projection of the gates of outputs.
        strength: The projection of a number for each head: how strongly a token is written into the state.
        decay: The projection of a number for each head: how much of the state is forgotten.
        output: The output projection.
        others: Names of the other modules with parameters: the convolution, and the norm of heads.
        activation: Entry of the configuration that names the activation behind the convolution.
    """

    structures: ClassVar[tuple[str, ...]] = ("values",)

    module: str
    query_key_value: str
    gate: str
    strength: str
    decay: str
    output: str
    others: tuple[str, ...]
    activation: str = "hidden_act"

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """The projections that read the stream, and the output projection."""
        return self.readers, (self.output,)

    @property
    def readers(self) -> tuple[str, ...]:
        """The projections of queries, keys and values, of gates, and of the two numbers for each head."""
        return self.query_key_value, self.gate, self.strength, self.decay

    @property
    def writers(self) -> tuple[str, ...]:
        """The output projection."""
        return (self.output,)

    @property
    def inside(self) -> tuple[str, ...]:
        """The other modules, and the module itself, which has parameters of its own."""
        return self.module, *self.others

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
        keys = torch.arange(groups * config.linear_key_head_dim).view(groups, -1)
        values = torch.arange(columns).view(groups, heads // groups, -1)
        numbers = torch.arange(heads).view(groups, -1)
        return DeltaNetPart(
            entry=self,
            block=number,
            prefix=prefix,
            query=Rows(prefix + self.query_key_value, keys),
            key=Rows(prefix + self.query_key_value, keys + keys.numel()),
            value=Rows(prefix + self.query_key_value, values + 2 * keys.numel()),
            gate=Rows(prefix + self.gate, values),
            strength=Rows(prefix + self.strength, numbers),
            decay=Rows(prefix + self.decay, numbers),
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
        heads, groups = self.strength.index.numel(), len(self.key.index)
        yield self._heads("value head", heads)
        yield self._heads("key head", groups, self.query, self.key)
        yield self._heads("delta net", 1, self.query, self.key, structure="blocks")

    def _heads(self, kind: str, groups: int, *read: Rows, structure: str = "") -> Coupling:
        """Coupling of whole heads.

        Args:
            kind: Kind of the coupling.
            groups: Number of groups that all heads make up.
            read: Rows beside those of value heads that belong to a group as a whole.
            structure: Structure of a recipe that removes such groups.
        """

        def grouped(rows: Rows) -> Tensor:
            return rows.index.reshape(groups, -1)

        sides = (rows_of(rows, grouped(rows)) for rows in (self.value, self.gate, *read))
        return Coupling(
            kind,
            (columns_of(self.output, grouped(self.output)), *sides),
            followers=tuple(rows_of(rows, grouped(rows)) for rows in (self.strength, self.decay)),
            structure=structure,
            large=True,
        )

    def gates(self, width: int | None) -> Iterator[tuple[Rows, Axis, int]]:
        """Gates on outputs and on the gates of each head; norms undo gates on values, and nearly those on queries."""
        size = self.output.index.shape[2]
        yield self.output, "columns", size
        yield self.gate, "rows", size
