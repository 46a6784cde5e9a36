"""Feed-forward parts: one first layer or two whose outputs are multiplied, neurons, and the layer that reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llm_surgeon.mathematics.keep_masks import Axis, Coupling, KeepMask
from llm_surgeon.models.experts import tell_factor
from llm_surgeon.models.parts.part import (
    ChannelOrder,
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
class FeedForward(PartEntry):
    """Names of the linear layers of a feed-forward part, within a block.

    Attributes:
        inputs: Layers whose outputs are multiplied (gate and up) or the single first layer; each row is a neuron. The
            same name twice is one matrix with the rows of both, one after the other.
        output: Layer that reads the neurons.
        activation: Entry of the configuration that names the activation, which must map 0 to 0; None if the class has a
            fixed activation that does.
        width: Entry of the configuration with the number of neurons.
        optional: Whether a model may have no such part at all.
        factor: Layer with one output that reads the stream; its sigmoid multiplies the part's output for each token.
            None where nothing does. The part is then a module of its own, which is called with the hidden states.
    """

    structures: ClassVar[tuple[str, ...]] = ("neurons",)

    inputs: tuple[str, ...]
    output: str
    activation: str | None
    width: str = "intermediate_size"
    optional: bool = False
    factor: str | None = None

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """The first layers, and the output layer."""
        return self.inputs, (self.output,)

    @property
    def readers(self) -> tuple[str, ...]:
        """The first layers."""
        return self.inputs

    @property
    def writers(self) -> tuple[str, ...]:
        """The output layer."""
        return (self.output,)

    @property
    def also_read(self) -> tuple[str, ...]:
        """The layer of the factor."""
        return () if self.factor is None else (f"{self.factor}.weight",)

    @property
    def inside(self) -> tuple[str, ...]:
        """The layer of the factor."""
        return () if self.factor is None else (self.factor,)

    def straighten(self, block: nn.Module) -> None:
        """Let the layers know by what their outputs are multiplied."""
        if self.factor is not None and has_module(block, self.output):
            part = block.get_submodule(self.output.rpartition(".")[0])
            tell_factor(part, block.get_submodule(self.factor))

    def check(self, config: Any, model_type: str) -> None:
        """Check that a dead neuron has no output.

        Raises:
            UnsupportedModelError: If the activation does not map 0 to 0.
        """
        if self.activation is not None:
            check_activation(config, self.activation, model_type)

    def locate(self, config: Any, block: nn.Module, number: int, prefix: str) -> FeedForwardPart | None:
        """Find the neurons of a block; None if the block has no feed-forward part."""
        if not has_module(block, self.output):
            return None
        count, names = channels_in(block, self.output), self.inputs
        neurons = torch.arange(count)
        # Where one matrix holds the rows of both inputs, the rows of the second follow the rows of the first.
        inputs = tuple(Rows(prefix + name, neurons + names[:at].count(name) * count) for at, name in enumerate(names))
        return FeedForwardPart(self, number, prefix, inputs, Rows(prefix + self.output, neurons))


@dataclass(frozen=True)
class FeedForwardPart(Part):
    """The neurons of one block, in the coordinates of the dense model.

    Attributes:
        entry: Names of the layers.
        block: Number of the block.
        prefix: Beginning of the names of the block's modules.
        inputs: Rows ``[neurons]`` of each first layer.
        output: Columns ``[neurons]`` of the output layer.
    """

    entry: FeedForward
    block: int
    prefix: str
    inputs: tuple[Rows, ...]
    output: Rows

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return len(self.output.index)

    def couplings(self) -> Iterator[Coupling]:
        """Couplings of each neuron, and of all neurons together."""
        for kind, structure, shape in (("neuron", "neurons", (-1, 1)), ("feed-forward", "blocks", (1, -1))):
            inputs = (rows_of(rows, rows.index.view(shape)) for rows in self.inputs)
            sides = columns_of(self.output, self.output.index.view(shape)), *inputs
            yield Coupling(kind, sides, structure=structure)

    def present(self, keep: Mapping[str, KeepMask]) -> Iterator[tuple[Rows, Axis, Tensor]]:
        """Neurons that the hidden tensor still has: dead neurons narrow it."""
        yield self.output, "columns", keep[self.output.layer].columns
        for rows in self.inputs:
            yield rows, "rows", keep[rows.layer].rows[rows.index]

    def sizes(self, keep: Mapping[str, KeepMask]) -> dict[str, int]:
        """Entry of the configuration with the number of neurons that are left."""
        return {self.entry.width: int(keep[self.output.layer].columns.sum())}

    def gates(self, width: int | None) -> Iterator[tuple[Rows, Axis, int]]:
        """Gates on outputs and on switches of each group of neurons; the second input would only repeat the output."""
        yield self.output, "columns", width or self.neurons
        yield self.inputs[0], "rows", width or self.neurons

    def orders(self) -> Iterator[ChannelOrder]:
        """The order of the neurons."""
        writers = tuple(Rows(rows.layer, rows.index[None]) for rows in self.inputs)
        yield ChannelOrder("neurons", Rows(self.output.layer, self.output.index[None, None]), writers)
