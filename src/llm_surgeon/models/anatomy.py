"""What a family's entry says about one model: its prunable layers, what couples them, what narrows with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import ConfigError, UnsupportedModelError
from llm_surgeon.mathematics.keep_masks import Coupling, KeepMask, Side
from llm_surgeon.models.couplings import attention_couplings, feed_forward_couplings
from llm_surgeon.models.family import Count, Family
from llm_surgeon.models.parts import AttentionPart, FeedForwardPart, attention_part, feed_forward_part

# A pattern of the recipe's default; not every model has a head by this name.
_HEAD = "lm_head"


@dataclass(frozen=True)
class LinearLayer:
    """A prunable linear layer, described in the coordinates of the dense model.

    Attributes:
        name: Path of its module in the model.
        block: Number of its decoder block.
        kind: The last part of its name, or as much of it as tells it from others.
        rows: Outputs of the dense layer.
        columns: Inputs of the dense layer, without the bias.
        bias: Whether it has a bias.
        input_group: Layers with the same group read the same input.
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
    """What can be pruned in one model.

    Attributes:
        family: The architecture.
        blocks: How many decoder blocks there are.
        layers: The prunable linear layers by name, in the order of the forward pass.
        couplings: What dies together.
        attentions: The attentions all of whose layers are prunable.
        feed_forwards: The feed-forward parts all of whose layers are prunable.
    """

    family: Family
    blocks: int
    layers: dict[str, LinearLayer]
    couplings: tuple[Coupling, ...]
    attentions: tuple[AttentionPart, ...] = ()
    feed_forwards: tuple[FeedForwardPart, ...] = ()

    def dense_masks(self) -> dict[str, KeepMask]:
        """Masks that keep everything."""
        return {name: KeepMask.dense(layer.rows, layer.columns) for name, layer in self.layers.items()}

    @property
    def prunable_weights(self) -> int:
        """Weights of the prunable layers of the dense model, without biases."""
        return sum(layer.rows * layer.columns for layer in self.layers.values())

    def block_of(self, coupling: Coupling) -> int:
        """The block that a coupling lies in."""
        return self.layers[coupling.sides[0].layer].block

    def extents(self, keep: Mapping[str, KeepMask]) -> dict[str, KeepMask]:
        """Rows and columns that the tensors between the layers still have, per layer.

        Dead neurons narrow the hidden tensor, and dead heads the attention; elsewhere (the residual stream, single
        dimensions of a head) a tensor keeps its width, and a layer has to know which part of it it reads or writes.
        """
        extents = self.dense_masks()
        for feed_forward in self.feed_forwards:
            _narrow(extents, feed_forward.output, "columns", keep[feed_forward.output.layer].columns)
            for rows in feed_forward.inputs:
                _narrow(extents, rows, "rows", keep[rows.layer].rows[rows.index])
        for part in self.attentions:
            heads = present_heads(part, keep)
            groups = heads.any(1)[:, None].expand(-1, part.width)
            queries = heads[:, :, None].expand(-1, -1, part.width)
            for rows, axis, present in (
                (part.query, "rows", queries),
                (part.key, "rows", groups),
                (part.value, "rows", groups),
                (part.output, "columns", queries),
            ):
                _narrow(extents, rows, axis, present)
        return extents

    def attention_counts(self, keep: Mapping[str, KeepMask]) -> dict[str, dict[str, int]]:
        """What the attributes of each narrowed attention have to be, by its path; nothing for an emptied one."""
        counts: dict[str, dict[str, int]] = {}
        for part in self.attentions:
            heads = present_heads(part, keep)
            if not bool(heads.any()):
                counts[part.module] = {}
            elif not bool(heads.all()) and self.family.attention.counts:
                counts[part.module] = self._counts(part, heads)
        return counts

    def _counts(self, part: AttentionPart, heads: Tensor) -> dict[str, int]:
        total, kv = int(heads.sum()), int(heads.any(1).sum())
        values: dict[Count, int] = {
            "heads": total,
            "key/value heads": kv,
            "shared": total // kv,
            "width": total * part.width,
        }
        return {attribute: values[count] for attribute, count in self.family.attention.counts}


def _narrow(extents: dict[str, KeepMask], rows: Any, axis: str, present: Tensor) -> None:
    extents[rows.layer].axis(axis)[rows.index.reshape(-1)] = present.reshape(-1)  # type: ignore[arg-type]


def present_heads(part: AttentionPart, keep: Mapping[str, KeepMask]) -> Tensor:
    """Query heads that the attention has to have, ``[kv heads, query heads of each]``; none if nothing is read of it.

    Attention needs equally many query heads for each key/value head. Where dead heads leave unequal numbers, some of
    the dead stay, with outputs that nothing reads.
    """
    alive = keep[part.output.layer].columns[part.output.index].any(2)
    most = int(alive.sum(1).max())
    # The living come first, and among the dead those that were first.
    chosen = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    present = torch.zeros_like(alive).scatter_(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    return present & alive.any(1, keepdim=True)


def examine(model: PreTrainedModel, family: Family, ignore: Sequence[str] = ()) -> Anatomy:
    """Find the prunable layers of a dense model and what couples them.

    Transposed linear layers (``Conv1D`` of GPT-2) are replaced, in place, by equal ``nn.Linear``; an export with the
    dense architecture has them back.

    Args:
        model: A model of the family, not pruned yet.
        family: Its entry.
        ignore: Regular expressions; a layer whose name ends in a match is left alone.

    Raises:
        UnsupportedModelError: If the model breaks an assumption of the entry.
        ConfigError: If every layer is ignored.
    """
    blocks = cast(nn.ModuleList, model.get_submodule(family.blocks))
    layers: dict[str, LinearLayer] = {}
    couplings: list[Coupling] = []
    attentions, feed_forwards = [], []
    _check_activation(model.config, family)
    _check_patterns(model, ignore)
    for number, block in enumerate(blocks):
        prefix = f"{family.blocks}.{number}."
        for group in family.shared_inputs:
            for kind in dict.fromkeys(group):
                name = prefix + kind
                if not any(re.search(f"(?:{pattern})$", name) for pattern in ignore):
                    _straighten(block, kind)
                    layers[name] = _linear_layer(block, family, kind, number)
        attentions.append(attention_part(model.config, family.attention, block, number, prefix))
        feed_forwards.append(feed_forward_part(family.feed_forward, block, number, prefix))
        couplings += attention_couplings(attentions[-1], bool(family.attention.head_norms))
        couplings += feed_forward_couplings(feed_forwards[-1])
    if not layers:
        raise ConfigError(
            f"The patterns to ignore ({', '.join(ignore)}) match every layer, so there is nothing to prune.",
            "Ignore fewer layers.",
        )
    return Anatomy(
        family,
        len(blocks),
        layers,
        _restrict(couplings, layers),
        tuple(part for part in attentions if layers.keys() >= set(part.layers)),
        tuple(part for part in feed_forwards if layers.keys() >= set(part.layers)),
    )


def _check_patterns(model: nn.Module, ignore: Sequence[str]) -> None:
    """Make sure that each pattern to ignore is of some module: with a typing error, what it means would be pruned."""
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
    """Replace the transposed layers of another model of the same architecture, in place, as ``examine`` does."""
    for name in anatomy.layers:
        _straighten(model, name)


def _straighten(block: nn.Module, kind: str) -> None:
    """Replace a transposed linear layer by a plain one, in place."""
    module = block.get_submodule(kind)
    if isinstance(module, Conv1D):
        parent, _, child = kind.rpartition(".")
        plain = nn.Linear(1, 1, device="meta")
        plain.in_features, plain.out_features = module.weight.shape
        gradient = module.weight.requires_grad
        plain.weight = nn.Parameter(module.weight.detach().T.contiguous(), requires_grad=gradient)
        plain.bias = module.bias
        setattr(block.get_submodule(parent), child, plain.train(module.training))


def _check_activation(config: Any, family: Family) -> None:
    name = getattr(config, family.feed_forward.activation)
    zero = float(ACT2FN[name](torch.zeros(1)))
    if zero != 0.0:
        raise UnsupportedModelError(
            f"The activation {name!r} maps 0 to {zero:g}, so a dead neuron still has an output.",
            f"The entry for {family.model_type!r} in llm_surgeon/models would have to leave its neurons uncoupled.",
        )


def _linear_layer(block: nn.Module, family: Family, kind: str, number: int) -> LinearLayer:
    module, prefix = block.get_submodule(kind), f"{family.blocks}.{number}."
    name, group = prefix + kind, next(group for group in family.shared_inputs if kind in group)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, not a dense linear layer.",
            "Give the original checkpoint, neither pruned nor quantised.",
        )
    rows, columns = module.weight.shape
    return LinearLayer(name, number, family.short_name(kind), rows, columns, module.bias is not None, prefix + group[0])


def _restrict(couplings: list[Coupling], layers: dict[str, LinearLayer]) -> tuple[Coupling, ...]:
    """Leave out what concerns layers that are not pruned; a coupling without a partner says nothing."""

    def known(sides: Sequence[Side]) -> tuple[Side, ...]:
        return tuple(side for side in sides if side.layer in layers)

    kept = (replace(c, sides=known(c.sides), followers=known(c.followers)) for c in couplings)
    return tuple(c for c in kept if c.sides and len(c.sides) + len(c.followers) > 1)


def to_index(mask: Tensor) -> Tensor:
    """Positions of the True entries of a one-dimensional mask."""
    return mask.nonzero().flatten()
