"""Anatomy of one model by its family's entry: the prunable layers, their couplings, and the tensors between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import ConfigError, UnsupportedModelError
from llm_surgeon.mathematics.keep_masks import Coupling, KeepMask, Side
from llm_surgeon.models.family import Family
from llm_surgeon.models.parts.part import Part, module_of

# The recipe's default ignores this pattern, so a model without a head of this name is no user's mistake.
_HEAD = "lm_head"


@dataclass(frozen=True)
class LinearLayer:
    """A prunable linear layer, described in the coordinates of the dense model.

    Attributes:
        name: Path of its module in the model.
        block: Number of its decoder block.
        kind: Last part of its name, or the name within its block if the last part is not unique there.
        rows: Outputs of the dense layer.
        columns: Inputs of the dense layer, without the bias.
        bias: Whether it has a bias.
        input_group: Name of the input that the layer reads: layers with the same group read the same input.
    """

    name: str
    block: int
    kind: str
    rows: int
    columns: int
    bias: bool
    input_group: str


@dataclass(frozen=True)
class Anatomy:
    """Prunable layers of one model, the parts that they belong to, and the couplings between them.

    Attributes:
        family: Entry of the architecture.
        blocks: Number of decoder blocks.
        layers: Prunable linear layers by name, in the order of the forward pass.
        couplings: Rows and columns that die together.
        located: Parts of all blocks, in the order of the forward pass.
        settings: Configuration of the dense model.
    """

    family: Family
    blocks: int
    layers: dict[str, LinearLayer]
    couplings: tuple[Coupling, ...]
    located: tuple[Part, ...] = ()
    settings: Any = None

    @property
    def parts(self) -> tuple[Part, ...]:
        """Parts whose layers are all prunable."""
        return tuple(part for part in self.located if self.layers.keys() >= set(part.layers))

    def dense_masks(self) -> dict[str, KeepMask]:
        """Masks that keep everything."""
        return {name: KeepMask.dense(layer.rows, layer.columns) for name, layer in self.layers.items()}

    @property
    def prunable_weights(self) -> int:
        """Number of weights of the prunable layers in the dense model, without biases."""
        return sum(layer.rows * layer.columns for layer in self.layers.values())

    def block_of(self, coupling: Coupling) -> int:
        """Number of the block that a coupling lies in."""
        return self.layers[coupling.sides[0].layer].block

    def extents(self, keep: Mapping[str, KeepMask]) -> dict[str, KeepMask]:
        """Rows and columns that the tensors between the layers still have, per layer.

        Parts say which tensors narrow: dead neurons narrow the hidden tensor, for example, and dead heads the
        attention. Elsewhere (the residual stream, single dimensions of a head) a tensor keeps its width, and a layer
        has to know which of its channels it reads or writes.
        """
        extents = self.dense_masks()
        for part in self.parts:
            for rows, axis, present in part.present(keep):
                extents[rows.layer].axis(axis)[rows.index.reshape(-1)] = present.reshape(-1)
        return extents

    def counts(self, keep: Mapping[str, KeepMask]) -> dict[str, dict[str, int]]:
        """Attributes of narrowed modules and their new values, by the module's path; nothing for an emptied one."""
        return {path: attributes for part in self.parts for path, attributes in part.counts(keep).items()}


def examine(model: PreTrainedModel, family: Family, ignore: Sequence[str] = ()) -> Anatomy:
    """Find the prunable layers of a dense model and their couplings.

    Transposed linear layers (``Conv1D`` of GPT-2), and experts in three-dimensional parameters, are replaced, in place,
    by equal ``nn.Linear``; an export has them back.

    Args:
        model: A model of the family, not pruned yet.
        family: Entry of the model's architecture.
        ignore: Regular expressions; a layer whose name ends in a match is not pruned.

    Raises:
        UnsupportedModelError: If the model breaks an assumption of the entry.
        ConfigError: If every layer is ignored.
    """
    blocks = cast(nn.ModuleList, model.get_submodule(family.blocks))
    layers: dict[str, LinearLayer] = {}
    parts = _parts_of(model, family)
    _check_patterns(model, ignore)
    for part in parts:
        for group in part.input_groups:
            for name in dict.fromkeys(group):
                kind = name.removeprefix(part.prefix)
                if not any(re.search(f"(?:{pattern})$", name) for pattern in ignore):
                    _straighten(blocks[part.block], kind)
                    layers[name] = _linear_layer(blocks[part.block], family, kind, part.block, group[0])
    couplings = [coupling for part in parts for coupling in part.couplings()]
    if not layers:
        raise ConfigError(
            f"The patterns to ignore ({', '.join(ignore)}) match every layer, so there is nothing to prune.",
            "Ignore fewer layers.",
        )
    return Anatomy(
        family,
        len(blocks),
        layers,
        restricted(couplings, layers),
        tuple(parts),
        model.config,
    )


def _parts_of(model: PreTrainedModel, family: Family) -> list[Part]:
    """Locate the parts of all blocks, in the order of the forward pass.

    Raises:
        UnsupportedModelError: If the model breaks an assumption of a part's entry, or no block has such a part.
    """
    parts: list[Part] = []
    settings = family.settings_of(model.config)
    for entry in family.parts:
        entry.check(settings, family.model_type)
    for number, block in enumerate(cast(nn.ModuleList, model.get_submodule(family.blocks))):
        for entry in family.parts:
            entry.straighten(block)
        prefix = f"{family.blocks}.{number}."
        found = (entry.locate(settings, block, number, prefix) for entry in family.parts)
        parts += [part for part in found if part is not None]
    for entry in family.parts:
        if not entry.optional and not any(part.entry == entry for part in parts):
            names = ", ".join(dict.fromkeys(name for group in entry.input_groups for name in group))
            raise UnsupportedModelError(
                f"No block of the model has the {type(entry).__name__} that the entry for {family.model_type!r} "
                f"describes ({names}).",
                "Correct the names, or leave the part out of the entry.",
            )
    return parts


def _check_patterns(model: nn.Module, ignore: Sequence[str]) -> None:
    """Check that each pattern to ignore matches some module: after a typing error, that module would be pruned."""
    names = [name for name, _ in model.named_modules()]
    for pattern in ignore:
        if pattern != _HEAD and not any(re.search(f"(?:{pattern})$", name) for name in names):
            raise ConfigError(
                f"The pattern {pattern!r} to ignore matches no layer of the model.",
                f"Correct it: the layers of a block are {', '.join(_last_names(names))}.",
            )


def _last_names(names: Sequence[str]) -> list[str]:
    """Last parts of the names within the first block, each once."""
    within = (name for name in names if re.search(r"\.0\.", name))
    return sorted({name.rpartition(".")[2] for name in within})


def straighten(model: nn.Module, anatomy: Anatomy) -> None:
    """Replace the layers of another model of the same architecture by plain ones, in place, as ``examine`` does."""
    for block in cast(nn.ModuleList, model.get_submodule(anatomy.family.blocks)):
        for entry in anatomy.family.parts:
            entry.straighten(block)
    for name in anatomy.layers:
        _straighten(model, name)


def _straighten(block: nn.Module, kind: str) -> None:
    """Replace a transposed linear layer by a plain one, in place."""
    module = module_of(block, kind)
    if isinstance(module, Conv1D):
        parent, _, child = kind.rpartition(".")
        plain = nn.Linear(1, 1, device="meta")
        plain.in_features, plain.out_features = module.weight.shape
        gradient = module.weight.requires_grad
        plain.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=gradient)
        plain.bias = module.bias
        setattr(block.get_submodule(parent), child, plain.train(module.training))


def _linear_layer(block: nn.Module, family: Family, kind: str, number: int, group: str) -> LinearLayer:
    module, name = block.get_submodule(kind), f"{family.blocks}.{number}.{kind}"
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, not a dense linear layer.",
            "Give the original checkpoint, neither pruned nor quantised.",
        )
    rows, columns = module.weight.shape
    return LinearLayer(name, number, family.short_name(kind), rows, columns, module.bias is not None, group)


def restricted(couplings: Iterable[Coupling], layers: Mapping[str, LinearLayer]) -> tuple[Coupling, ...]:
    """Leave layers that are not prunable out of couplings, and couplings that have only one layer left."""

    def known(sides: Sequence[Side]) -> tuple[Side, ...]:
        return tuple(side for side in sides if side.layer in layers)

    kept = (replace(c, sides=known(c.sides), followers=known(c.followers)) for c in couplings)
    return tuple(c for c in kept if c.sides and len(c.sides) + len(c.followers) > 1)


def to_index(mask: Tensor) -> Tensor:
    """Positions of the True entries of a one-dimensional mask."""
    return mask.nonzero().flatten()
