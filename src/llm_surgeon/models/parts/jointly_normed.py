"""Attention with norms over all heads together, whose heads cannot go one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llm_surgeon.mathematics.keep_masks import Coupling, KeepMask
from llm_surgeon.models.parts.attention import Attention, AttentionPart


@dataclass(frozen=True)
class JointlyNormedAttention(Attention):
    """Names of an attention part whose queries, and keys, are normalised over the dimensions of all heads together.

    A head whose output nothing reads still counts in the norm of the other heads. So queries and keys are not dead
    with it, and the number of heads stays, unless the whole attention goes.

    Attributes:
        joint_norms: The norms of queries and keys.
    """

    structures: ClassVar[tuple[str, ...]] = ("values",)

    joint_norms: tuple[str, ...] = ()

    @property
    def inside(self) -> tuple[str, ...]:
        """The norms, whose weights follow the order of the dimensions of heads."""
        return self.joint_norms

    @property
    def refused(self) -> dict[str, str]:
        """Heads."""
        return {"heads": "normalises queries and keys over all heads together, so that no head can go alone"}

    def locate(self, config: Any, block: nn.Module, number: int, prefix: str) -> JointlyNormedPart | None:
        """Find the heads of a block; None if the block has no attention."""
        found = super().locate(config, block, number, prefix)
        if found is None:
            return None
        return JointlyNormedPart(**{field.name: getattr(found, field.name) for field in fields(found)})


@dataclass(frozen=True)
class JointlyNormedPart(AttentionPart):
    """The heads of one block, in the coordinates of the dense model."""

    def couplings(self) -> Iterator[Coupling]:
        """Couplings of single value dimensions, and of the whole attention."""
        yield from (coupling for coupling in super().couplings() if coupling.structure in ("values", "blocks"))

    def _query_key_couplings(self) -> Iterator[Coupling]:
        """No couplings: a dead query dimension leaves the others larger, and its key dimension too."""
        yield from ()

    def present_heads(self, keep: Mapping[str, KeepMask]) -> Tensor:
        """All query heads, bool ``[kv heads, query heads of each]``; none if none is read."""
        read = keep[self.output.layer].columns.any()
        return read.expand(self.kv, self.shared).clone().to(torch.bool)
