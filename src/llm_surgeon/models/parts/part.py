"""The socket for parts of blocks: a kind's entry, which names layers, and the part that it locates in one model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.mathematics.keep_masks import Axis, Coupling, KeepMask, Side


@dataclass(frozen=True)
class Rows:
    """Some rows, or columns, of one layer; ``index`` may have any shape."""

    layer: str
    index: Tensor


def rows_of(rows: Rows, index: Tensor) -> Side:
    """Side of a coupling: rows of the layer, ``index [groups, members]``."""
    return Side(rows.layer, "rows", index)


def columns_of(rows: Rows, index: Tensor) -> Side:
    """Side of a coupling: columns of the layer, ``index [groups, members]``."""
    return Side(rows.layer, "columns", index)


@dataclass(frozen=True)
class ChannelOrder:
    """Channels inside a part whose order is free, as long as the layers that write and read them agree on it.

    Attributes:
        name: Word for the channels, such as "neurons".
        reader: Columns ``[sets, readings, channels]`` of the layer that reads the channels; it may read a channel
            several times. Channels change places within their set only.
        writers: Rows ``[sets, channels]`` of the layers that write the channels.
    """

    name: str
    reader: Rows
    writers: tuple[Rows, ...]

    @property
    def sets(self) -> int:
        """Number of sets of channels."""
        return self.reader.index.shape[0]

    @property
    def channels(self) -> int:
        """Number of channels of a set."""
        return self.reader.index.shape[2]


class PartEntry(Protocol):
    """A kind of part in a family's entry: the names of the part's linear layers within a block.

    Entries are frozen dataclasses that subclass this class. A kind overrides a default where its parts differ.

    Attributes:
        structures: Structures of a recipe that remove something inside the part, such as ``neurons``. The structure
            ``blocks`` removes a part as a whole.
    """

    structures: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of all layers of the part, grouped by the input that they read, in the order of the forward pass."""

    @property
    @abstractmethod
    def readers(self) -> tuple[str, ...]:
        """Names of the layers that read the residual stream."""

    @property
    @abstractmethod
    def writers(self) -> tuple[str, ...]:
        """Names of the layers whose outputs are added to the residual stream."""

    @property
    def inside(self) -> tuple[str, ...]:
        """Names of other modules of the part, whose parameters do not depend on the order of the residual stream."""
        return ()

    @property
    def also_read(self) -> tuple[str, ...]:
        """Names of parameters, besides those of the layers, whose columns read the residual stream."""
        return ()

    @property
    def optional(self) -> bool:
        """Whether a model may have no such part at all."""
        return False

    @property
    def emptied(self) -> str | None:
        """Name, within its module, of the output projection that replaces the module of an emptied part; or None."""
        return None

    @property
    def returns_tuple(self) -> bool:
        """Whether the module of a part returns a tuple, its output first, rather than its output."""
        return True

    @property
    def counts_tokens(self) -> bool:
        """Whether the cache of the part says how long the cached text is; some block has to have such a part."""
        return False

    @property
    def refused(self) -> dict[str, str]:
        """Structures that the parts look like having and cannot lose, and the reason for each, as a predicate."""
        return {}

    @property
    def fixed(self) -> str | None:
        """Reason why the transformers class cannot be built with a smaller part, in words; None if it can be."""
        return None

    def check(self, config: Any, model_type: str) -> None:
        """Check that a model is as the part's couplings assume.

        Raises:
            UnsupportedModelError: If the model is not.
        """
        return

    def numbered(self, name: str, block: nn.Module) -> tuple[str, ...]:
        """Names that a layer's name stands for in a block: itself, unless the part has numbered copies of a layer."""
        return (name,)

    def straighten(self, block: nn.Module) -> None:
        """Replace modules of a block by equal ones with linear layers, in place, where the part's are others."""
        return

    @abstractmethod
    def locate(self, config: Any, block: nn.Module, number: int, prefix: str) -> Part | None:
        """Find the part in a block of a dense model; None if the block has no such part.

        Args:
            config: Configuration of the model.
            block: The block, whose layers may still be transposed.
            number: Number of the block.
            prefix: Beginning of the names of the block's modules, such as ``model.layers.3.``.
        """


class Part(Protocol):
    """One part of one block, in the coordinates of the dense model.

    Parts are frozen dataclasses that subclass this class. A kind overrides a default where its parts differ.

    Attributes:
        entry: Entry that located the part.
        block: Number of the block.
        prefix: Beginning of the names of the block's modules.
    """

    entry: PartEntry
    block: int
    prefix: str

    @property
    def input_groups(self) -> tuple[tuple[str, ...], ...]:
        """Paths of the part's layers, grouped by the input that they read, in the order of the forward pass."""
        return tuple(tuple(self.prefix + name for name in group) for group in self.entry.input_groups)

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the part's layers, each once."""
        return tuple(dict.fromkeys(name for group in self.input_groups for name in group))

    @property
    def writers(self) -> tuple[str, ...]:
        """Paths of the layers whose outputs are added to the residual stream."""
        return tuple(self.prefix + name for name in self.entry.writers)

    @property
    def keeps_form(self) -> bool:
        """Whether exports have the part's tensors in a form of the class's own, see ``stored``."""
        return False

    @property
    def neurons(self) -> int:
        """Number of neurons, which share gates in groups; 0 for a part without neurons."""
        return 0

    @property
    def least(self) -> dict[str, int]:
        """Numbers of groups that have to be left of some couplings, by the kind of the coupling."""
        return {}

    @property
    def multiples(self) -> dict[str, int]:
        """Numbers that the groups left of some couplings have to be a multiple of, by the kind of the coupling."""
        return {}

    def widths(self, accepted: Callable[[Mapping[str, int]], bool]) -> dict[str, frozenset[int]]:
        """Numbers of groups that may be left of some couplings, so that any choice among them is accepted.

        Args:
            accepted: Whether entries of the configuration, as ``sizes`` gives them, are.

        Returns:
            Numbers of groups, in each pool, by the kind of the coupling; kinds that are not there may leave any number.
        """
        return {}

    @abstractmethod
    def couplings(self) -> Iterator[Coupling]:
        """Rows and columns that live and die together, small groups first."""

    def present(self, keep: Mapping[str, KeepMask]) -> Iterator[tuple[Rows, Axis, Tensor]]:
        """Channels that the tensors inside the part still have, for tensors that narrow with the matrices.

        Yields:
            Rows or columns of a layer, the axis that says which, and whether each of them is present.
        """
        yield from ()

    def counts(self, keep: Mapping[str, KeepMask]) -> dict[str, dict[str, int]]:
        """Attributes of narrowed modules and their new values, by the module's path.

        The value of a parameter is its new length. A module with an empty dictionary is emptied: its output projection,
        ``PartEntry.emptied``, replaces it.
        """
        return {}

    def left(self, keep: Mapping[str, KeepMask]) -> dict[str, dict[str, Any]]:
        """Arguments of what replaces an emptied module, by the module's path; see ``EmptyAttention``."""
        entry = self.entry
        arguments = {"output": entry.emptied or "", "returns_tuple": entry.returns_tuple}
        return {path: arguments for path, attributes in self.counts(keep).items() if not attributes}

    def narrowed(self, keep: Mapping[str, KeepMask]) -> Iterator[tuple[str, Tensor]]:
        """Parameters beside matrices that narrow along their first axis, whose new lengths are among the counts.

        Yields:
            Path of a parameter, and whether each of its entries in the dense model is present.
        """
        yield from ()

    def narrow(self, model: nn.Module, keep: Mapping[str, KeepMask]) -> None:
        """Fit other modules of the part to its matrices, in place, where counts and ``narrowed`` do not do it.

        Args:
            model: The model, with the matrices that are left.
            keep: Masks of the rows and columns that are left.
        """
        return

    def stored(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """State of a model with the part's tensors as the transformers class has them.

        Args:
            state: Tensors of the model by name, without those of layers that have no weights left.
        """
        return state

    def sizes(self, keep: Mapping[str, KeepMask]) -> dict[str, int]:
        """Entries of the configuration with which the transformers class builds the part as pruning left it."""
        return {}

    def gates(self, width: int | None) -> Iterator[tuple[Rows, Axis, int]]:
        """Rows and columns that gates scale.

        Args:
            width: Number of neurons that share a gate; None takes all of a part.

        Yields:
            Rows or columns of a layer, the axis that says which, and the number of consecutive ones that share a gate.
        """
        yield from ()

    def orders(self) -> Iterator[ChannelOrder]:
        """Channels inside the part whose order is free."""
        yield from ()

    def products(self, keep: Mapping[str, KeepMask]) -> int:
        """Half the number of multiplications without weights, for each pair of tokens of which one sees the other."""
        return 0


def has_module(block: nn.Module, name: str) -> bool:
    """Whether a block has a module of this name."""
    try:
        block.get_submodule(name)
    except AttributeError:
        return False
    return True


def module_of(block: nn.Module, name: str) -> nn.Module:
    """The module of a block that has this name.

    Raises:
        UnsupportedModelError: If the block has no such module.
    """
    if not has_module(block, name):
        names = ", ".join(found for found, module in block.named_modules() if isinstance(module, (nn.Linear, Conv1D)))
        raise UnsupportedModelError(
            f"A block of the model has no {name}.", f"Correct the family's entry: its linear layers are {names}."
        )
    return block.get_submodule(name)


def channels_in(block: nn.Module, kind: str) -> int:
    """Number of inputs of a block's layer, which may be transposed.

    Raises:
        UnsupportedModelError: If the module is not a dense linear layer.
    """
    module = module_of(block, kind)
    if not isinstance(module, (nn.Linear, Conv1D)):
        raise UnsupportedModelError(
            f"{kind} is a {type(module).__name__}, not a dense linear layer.",
            "Give the original checkpoint, neither pruned nor quantised.",
        )
    return module.nx if isinstance(module, Conv1D) else module.in_features


def check_activation(config: Any, entry: str, model_type: str) -> None:
    """Check that an activation maps 0 to 0, so that what is dead before it is dead behind it.

    Args:
        config: Configuration of the model.
        entry: Entry of the configuration that names the activation.
        model_type: Type of the model, for the message.

    Raises:
        UnsupportedModelError: If it does not.
    """
    name = getattr(config, entry)
    zero = float(ACT2FN[name](torch.zeros(1)))
    if zero != 0.0:
        raise UnsupportedModelError(
            f"The activation {name!r} maps 0 to {zero:g}, so a dead neuron still has an output.",
            f"The entry for {model_type!r} in llm_surgeon/models would have to leave its neurons uncoupled.",
        )


def equally_many(alive: Tensor) -> Tensor:
    """Heads that a part has to have, bool ``[groups, heads of each]``, of those alive; none of groups without any.

    All groups need equally many heads. Where dead heads leave unequal numbers, some of the dead heads stay, and nothing
    reads their outputs.
    """
    most = int(alive.sum(1).max())
    # Living heads come first, and then dead heads in their order.
    chosen = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    present = torch.zeros_like(alive).scatter_(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    return present & alive.any(1, keepdim=True)
