"""Linear layers without structures of their own, which are not made smaller but may lose single weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from llm_surgeon.mathematics.keep_masks import Coupling
from llm_surgeon.models.parts.part import Part, PartEntry, has_module


@dataclass(frozen=True)
class PlainLayers(PartEntry):
    """Names of linear layers that no coupling describes, such as those of an attention with compressed keys and values.

    Attributes:
        groups: Names of the layers, grouped by the input that they read, in the order of the forward pass; a model may
            lack some of them.
        reading: Names of the layers that read the residual stream.
        writing: Names of the layers whose outputs are added to the residual stream.
        others: Names of other modules of the part, such as norms, that have no part in the residual stream.
    """

    structures: ClassVar[tuple[str, ...]] = ()

    groups: tuple[tuple[str, ...], ...]
    reading: tuple[str, ...]
    writing: tuple[str, ...]
    others: tuple[str, ...] = ()

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """The groups of layers."""
        return self.groups

    @property
    def readers(self) -> tuple[str, ...]:
        """The layers that read the stream."""
        return self.reading

    @property
    def writers(self) -> tuple[str, ...]:
        """The layers that write into it."""
        return self.writing

    @property
    def inside(self) -> tuple[str, ...]:
        """The other modules."""
        return self.others

    def locate(self, config: Any, block: nn.Module, number: int, prefix: str) -> PlainPart | None:
        """Find the layers that a block has; None if it lacks those that write into the stream."""
        if not all(has_module(block, name) for name in self.writing):
            return None
        there = (tuple(prefix + name for name in group if has_module(block, name)) for group in self.groups)
        return PlainPart(self, number, prefix, tuple(group for group in there if group))


@dataclass(frozen=True)
class PlainPart(Part):
    """The layers of one block.

    Attributes:
        entry: Names of the layers.
        block: Number of the block.
        prefix: Beginning of the names of the block's modules.
        there: Paths of the layers that the block has, grouped by the input that they read.
    """

    entry: PlainLayers
    block: int
    prefix: str
    there: tuple[tuple[str, ...], ...]

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the layers that the block has."""
        return self.there

    def couplings(self) -> Iterator[Coupling]:
        """No couplings."""
        yield from ()
