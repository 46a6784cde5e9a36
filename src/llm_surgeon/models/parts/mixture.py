"""Mixtures of experts: a router, experts of which each token is sent to some, and the neurons of each expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.mathematics.keep_masks import Axis, Coupling, KeepMask, Side
from llm_surgeon.models.experts import DOWN, GATE, STACKED, UP, Experts, Layout, canonical, keep_experts, stacked
from llm_surgeon.models.parts.part import (
    ChannelOrder,
    Part,
    PartEntry,
    Rows,
    check_activation,
    columns_of,
    has_module,
    rows_of,
)
from llm_surgeon.models.streaming import weights_of

# As many numbers of 16 bits as 16 bytes hold.
_NEURONS = 8
_APART = "has the experts of a block in one tensor, so that their matrices cannot lose different {}"


@dataclass(frozen=True)
class MixtureOfExperts(PartEntry):
    """Names of a mixture's modules and configuration entries.

    The experts are gated: ``down(activation(gate(x)) * up(x))``.

    Attributes:
        router: The router, which is called with the hidden states and returns logits, weights and numbers of experts.
        experts: The module with the experts' parameters.
        count: Entry of the configuration with the number of experts.
        chosen: Entry with the number of experts that each token is sent to.
        width: Entry with the number of neurons of an expert.
        groups: Entry with the number of groups of experts, of which a token goes to some only; None without groups.
        chosen_groups: Entry with the number of groups that a token goes to.
        tied_width: Whether the width of an expert determines that of others beside it, which always run.
        router_tensors: Parameters and buffers of the router with an entry for each expert.
        activation: Entry that names the activation, which must map 0 to 0; None if the class has a fixed one that does.
        layout: Layout of the experts' parameters.
        value_kills: Whether a neuron has no output if its value is 0; otherwise its switch alone decides.
    """

    structures: ClassVar[tuple[str, ...]] = ("neurons", "experts")

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    count: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    groups: str | None = None
    chosen_groups: str = "topk_group"
    tied_width: bool = False
    router_tensors: tuple[str, ...] = ("weight",)
    activation: str | None = "hidden_act"
    layout: Layout = STACKED
    value_kills: bool = True

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """The layers of an expert, without its number."""
        return tuple(tuple(f"{self.experts}.{layer}" for layer in group) for group in ((GATE, UP), (DOWN,)))

    @property
    def readers(self) -> tuple[str, ...]:
        """The first layers of an expert, without its number."""
        return self.input_groups[0]

    @property
    def writers(self) -> tuple[str, ...]:
        """The last layer of an expert, without its number."""
        return self.input_groups[1]

    @property
    def also_read(self) -> tuple[str, ...]:
        """The router's rows."""
        return (f"{self.router}.weight",)

    @property
    def inside(self) -> tuple[str, ...]:
        """The router, whose rows stand for experts."""
        return (self.router,)

    @property
    def refused(self) -> dict[str, str]:
        """Structures that would leave matrices of different shapes in one tensor."""
        tied = {"neurons": "ties the width of its experts to that of those that always run"} if self.tied_width else {}
        return tied | {
            "rows-columns": _APART.format("rows and columns"),
            "values": "has the experts of a block in one tensor, which the modelling file for single dimensions of "
            "heads does not know",
            "blocks": "has mixtures of experts, which no single group of rows or columns stops",
        }

    def check(self, config: Any, model_type: str) -> None:
        """Check that a dead neuron has no output; see ``check_activation``."""
        if self.activation is not None:
            check_activation(config, self.activation, model_type)

    def numbered(self, name: str, block: nn.Module) -> tuple[str, ...]:
        """Names of a layer of all experts in a block: ``mlp.experts.down_proj`` is one for each number."""
        if not has_module(block, self.experts):
            return ()
        experts, layer = block.get_submodule(self.experts), name.rpartition(".")[2]
        count = len(experts) if isinstance(experts, Experts) else 0
        return tuple(f"{self.experts}.{number}.{layer}" for number in range(count))

    def straighten(self, block: nn.Module) -> None:
        """Give the experts of a block their canonical form, in place."""
        if has_module(block, self.experts) and not isinstance(block.get_submodule(self.experts), Experts):
            parent, _, child = self.experts.rpartition(".")
            setattr(block.get_submodule(parent), child, canonical(block.get_submodule(self.experts), self.layout))

    def locate(self, config: Any, block: nn.Module, number: int, prefix: str) -> MixturePart | None:
        """Find the experts of a block; None if the block has none.

        Raises:
            UnsupportedModelError: If the module of experts is of another kind.
        """
        if not has_module(block, self.experts):
            return None
        experts = block.get_submodule(self.experts)
        if not isinstance(experts, Experts):
            raise UnsupportedModelError(
                f"{prefix}{self.experts} is a {type(experts).__name__}, not a mixture of dense experts.",
                "Give the original checkpoint, neither pruned nor quantised.",
            )
        first = cast(nn.Linear, experts[0].down_proj)
        groups, taken = 1, 1
        if self.groups is not None:
            groups, taken = getattr(config, self.groups), getattr(config, self.chosen_groups)
        each = math.ceil(getattr(config, self.chosen) / taken)
        # Groups are compared by their two best experts.
        each = each if self.groups is None else max(each, 2)
        return MixturePart(self, number, prefix, len(experts), first.in_features, groups, each)


@dataclass(frozen=True)
class MixturePart(Part):
    """The experts of one block, in the coordinates of the dense model.

    Attributes:
        entry: Names of the modules.
        block: Number of the block.
        prefix: Beginning of the names of the block's modules.
        experts: Number of experts.
        width: Number of neurons of each.
        groups: Number of groups of experts, all of which keep equally many.
        chosen: Number of experts of a group that a token may be sent to.
    """

    entry: MixtureOfExperts
    block: int
    prefix: str
    experts: int
    width: int
    groups: int
    chosen: int

    def _rows(self, number: int, layer: str) -> Rows:
        return Rows(f"{self.prefix}{self.entry.experts}.{number}.{layer}", torch.arange(self.width))

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the layers of all experts, grouped by the input that they read."""
        groups = ((GATE, UP), (DOWN,))
        return tuple(
            tuple(self._rows(number, layer).layer for layer in group)
            for number in range(self.experts)
            for group in groups
        )

    def layers_of_experts(self) -> Iterator[tuple[str, ...]]:
        """Paths of the layers of each expert, its last layer at the end."""
        for number in range(self.experts):
            yield tuple(self._rows(number, layer).layer for layer in (GATE, UP, DOWN))

    @property
    def writers(self) -> tuple[str, ...]:
        """Paths of the last layers."""
        return tuple(self._rows(number, DOWN).layer for number in range(self.experts))

    @property
    def keeps_form(self) -> bool:
        """True: experts are in three-dimensional parameters."""
        return True

    @property
    def least(self) -> dict[str, int]:
        """Experts of a group: as many as a token is sent to."""
        return {"expert": self.chosen}

    @property
    def multiples(self) -> dict[str, int]:
        """Neurons: the product of all experts at once, by which transformers runs them, wants rows of 16 bytes."""
        return {"neuron of an expert": _NEURONS}

    def couplings(self) -> Iterator[Coupling]:
        """Couplings of each neuron of each expert, and of each expert's neurons together.

        Neurons of different experts are in different pools, so that all experts of a block keep equally many.
        """
        for number in range(self.experts):
            pools = torch.full((self.width,), number)
            sides, followers = self._sides(number, (-1, 1))
            yield Coupling("neuron of an expert", sides, followers, pools, "neurons")
        for number in range(self.experts):
            pools = torch.tensor([number * self.groups // self.experts])
            sides, followers = self._sides(number, (1, -1))
            yield Coupling("expert", sides, followers, pools, "experts")

    def _sides(self, number: int, shape: tuple[int, int]) -> tuple[tuple[Side, ...], tuple[Side, ...]]:
        """Sides and followers of couplings of an expert's neurons, in groups of a shape."""
        down, gate, up = (self._rows(number, layer) for layer in (DOWN, GATE, UP))
        index = down.index.view(shape)
        sides, values = (columns_of(down, index), rows_of(gate, index)), (rows_of(up, index),)
        return (sides + values, ()) if self.entry.value_kills else (sides, values)

    def present(self, keep: Mapping[str, KeepMask]) -> Iterator[tuple[Rows, Axis, Tensor]]:
        """Neurons that the hidden tensor of each expert still has."""
        for number in range(self.experts):
            down, gate, up = (self._rows(number, layer) for layer in (DOWN, GATE, UP))
            yield down, "columns", keep[down.layer].columns
            yield gate, "rows", keep[gate.layer].rows
            yield up, "rows", keep[up.layer].rows

    def kept(self, keep: Mapping[str, KeepMask]) -> list[int]:
        """Numbers of the experts that have neurons left."""
        return [n for n in range(self.experts) if bool(keep[self._rows(n, DOWN).layer].columns.any())]

    def narrow(self, model: nn.Module, keep: Mapping[str, KeepMask]) -> None:
        """Take the experts that are gone out of the router."""
        block = model.get_submodule(self.prefix.rstrip("."))
        experts = cast(Experts, block.get_submodule(self.entry.experts))
        router = block.get_submodule(self.entry.router)
        keep_experts(experts, router, self.kept(keep), self.entry.router_tensors)
        weights_of(model).settle(router)

    def sizes(self, keep: Mapping[str, KeepMask]) -> dict[str, int]:
        """Entries of the configuration with the numbers of experts, and of the neurons of each.

        Raises:
            UnsupportedModelError: If the experts have different numbers of neurons, which one tensor cannot hold.
        """
        kept = self.kept(keep)
        widths = {int(keep[self._rows(number, DOWN).layer].columns.sum()) for number in kept}
        if len(widths) > 1:
            raise UnsupportedModelError(
                f"The experts of block {self.block} have different numbers of neurons, which one tensor cannot hold.",
                "Prune whole experts, or equally many neurons of each.",
            )
        return {self.entry.count: len(kept), self.entry.width: next(iter(widths), 0)}

    def stored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State with the experts in three-dimensional parameters, as the class has them."""
        return stacked(state, self.prefix + self.entry.experts, self.entry.layout)

    def widths(self, accepted: Callable[[Mapping[str, int]], bool]) -> dict[str, frozenset[int]]:
        """Numbers of experts, and of neurons of each, that the class takes: all."""
        return {}

    def gates(self, width: int | None) -> Iterator[tuple[Rows, Axis, int]]:
        """A gate on the output of each expert."""
        for number in range(self.experts):
            yield self._rows(number, DOWN), "columns", self.width

    def orders(self) -> Iterator[ChannelOrder]:
        """The order of the neurons of each expert."""
        for number in range(self.experts):
            down, gate, up = (self._rows(number, layer) for layer in (DOWN, GATE, UP))
            yield ChannelOrder(
                "neurons of an expert",
                Rows(down.layer, down.index[None, None]),
                tuple(Rows(rows.layer, rows.index[None]) for rows in (gate, up)),
            )
