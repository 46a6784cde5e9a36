"""What can be pruned: a declarative description of an architecture, and what it says about one model.

To support an architecture, write one ``Family`` in a file beside this one and list it in ``llm_surgeon.models``.
The contract suite (``tests/models/test_contract.py``) then checks it on a tiny random model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from llm_surgeon.errors import ConfigError, UnsupportedModelError
from llm_surgeon.selection import Coupling, KeepMask, Side


@dataclass(frozen=True)
class Attention:
    """Names, within a block, of the linear layers of its attention.

    Heads are read from the configuration: ``num_attention_heads``, ``num_key_value_heads`` if it has them, and the
    head dimension from the height of the query matrix.

    Attributes:
        query: The query projection.
        key: The key projection.
        value: The value projection.
        output: The output projection.
        rotary: Whether dimension d of a head is rotated together with d + head_dim / 2, which ties the two.
        head_norms: Norms over the dimensions of each head of queries and keys. A dimension whose partner is dead
            still counts in the norm's denominator, so with them queries and keys do not die together.
    """

    query: str
    key: str
    value: str
    output: str
    rotary: bool
    head_norms: tuple[str, ...] = ()


@dataclass(frozen=True)
class FeedForward:
    """Names, within a block, of the linear layers of its feed-forward part.

    Attributes:
        inputs: Layers whose outputs are multiplied (gate and up) or the single first layer; each row is a neuron.
        output: The layer that reads the neurons.
        activation: The configuration's entry that names the activation, which must map 0 to 0.
    """

    inputs: tuple[str, ...]
    output: str
    activation: str


@dataclass(frozen=True)
class Residual:
    """Names of what reads or writes the residual stream, besides the linear layers of the blocks and the head.

    A model may be without any of those that are optional.

    Attributes:
        tokens: Path of the token embedding.
        norms: Names, within a block, of its norms.
        final_norm: Path of the norm after the last block, optional.
        positions: Path of the learned embedding of positions, optional.
        project_in: Path of the linear layer between token embeddings of another width and the stream, optional.
        project_out: Path of the linear layer between the stream and a head of another width, optional.
    """

    tokens: str
    norms: tuple[str, ...]
    final_norm: str
    positions: str | None = None
    project_in: str | None = None
    project_out: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        model_class: The class in transformers that computes the language model's logits.
        config_class: Its configuration class.
        blocks: Path of the list of decoder blocks.
        attention: The attention's layers.
        feed_forward: The feed-forward layers.
        residual: What carries the residual stream.
    """

    model_type: str
    model_class: str
    config_class: str
    blocks: str
    attention: Attention
    feed_forward: FeedForward
    residual: Residual

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Layers of a block, grouped by the input they read."""
        attention, feed_forward = self.attention, self.feed_forward
        return (
            (attention.query, attention.key, attention.value),
            (attention.output,),
            feed_forward.inputs,
            (feed_forward.output,),
        )


@dataclass(frozen=True)
class LinearLayer:
    """A prunable linear layer, described in the coordinates of the dense model.

    Attributes:
        name: Path of its module in the model.
        block: Number of its decoder block.
        kind: The last part of its name.
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
        layers: The prunable linear layers by name, in the order of the forward pass.
        couplings: What dies together.
        narrow: Layer and axis of the structures that really narrow the tensor between two matrices (neurons): their
            neighbours shrink with them, and no index is needed at run time.
    """

    family: Family
    layers: dict[str, LinearLayer]
    couplings: tuple[Coupling, ...]
    narrow: frozenset[tuple[str, str]] = field(default_factory=frozenset)

    def dense_masks(self) -> dict[str, KeepMask]:
        """Masks that keep everything."""
        return {name: KeepMask.dense(layer.rows, layer.columns) for name, layer in self.layers.items()}

    @property
    def prunable_weights(self) -> int:
        """Weights of the prunable layers of the dense model, without biases."""
        return sum(layer.rows * layer.columns for layer in self.layers.values())


def examine(model: PreTrainedModel, family: Family, ignore: Sequence[str] = ()) -> Anatomy:
    """Find the prunable layers of a dense model and what couples them.

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
    narrow: set[tuple[str, str]] = set()
    _check_activation(model.config, family)
    for number, block in enumerate(blocks):
        prefix = f"{family.blocks}.{number}."
        for group in family.shared_inputs:
            for kind in group:
                name = prefix + kind
                if not any(re.search(f"(?:{pattern})$", name) for pattern in ignore):
                    layers[name] = _linear_layer(block, name, kind, number, prefix + group[0])
        couplings += _attention_couplings(model.config, family.attention, block, prefix)
        couplings.append(_neuron_coupling(family.feed_forward, block, prefix))
        narrow |= _narrow_axes(family.feed_forward, prefix, layers)
    if not layers:
        raise ConfigError(
            f"The patterns to ignore ({', '.join(ignore)}) match every layer, so there is nothing to prune.",
            "Ignore fewer layers.",
        )
    return Anatomy(family, layers, _restrict(couplings, layers), frozenset(narrow))


def _check_activation(config: Any, family: Family) -> None:
    name = getattr(config, family.feed_forward.activation)
    zero = float(ACT2FN[name](torch.zeros(1)))
    if zero != 0.0:
        raise UnsupportedModelError(
            f"The activation {name!r} maps 0 to {zero:g}, so a dead neuron still has an output.",
            f"The entry for {family.model_type!r} in llm_surgeon/models would have to leave its neurons uncoupled.",
        )


def _linear_layer(block: nn.Module, name: str, kind: str, number: int, group: str) -> LinearLayer:
    module = block.get_submodule(kind)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, not a dense linear layer.",
            "Give the original checkpoint, neither pruned nor quantised.",
        )
    rows, columns = module.weight.shape
    return LinearLayer(name, number, kind.rpartition(".")[2], rows, columns, module.bias is not None, group)


def _shape(block: nn.Module, kind: str) -> torch.Size:
    return cast(nn.Linear, block.get_submodule(kind)).weight.shape


@dataclass(frozen=True)
class Heads:
    """How the rows of the query, key and value layers are cut into heads.

    Attributes:
        kv: Key/value heads.
        shared: Query heads that share one of them.
        width: Dimensions of a head.
    """

    kv: int
    shared: int
    width: int


def heads_of(config: Any, attention: Attention, block: nn.Module) -> Heads:
    """The heads of one block of a dense model, see ``Attention``."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    return Heads(kv, heads // kv, _shape(block, attention.query)[0] // heads)


def _attention_couplings(config: Any, attention: Attention, block: nn.Module, prefix: str) -> list[Coupling]:
    """Value dimensions, query/key pairs, and query heads that nothing reads any more.

    A value row feeds the same column of every query head that shares its key/value head. A query dimension meets
    the key dimension of the same number; rotary embeddings rotate two dimensions into each other, so both of the
    pair have to be dead. If the output projection reads nothing of a query head, its queries are without effect.
    """
    heads = heads_of(config, attention, block)
    kv_heads, shared, width = heads.kv, heads.shared, heads.width
    query = torch.arange(kv_heads * shared * width).view(kv_heads, shared, width)
    key = torch.arange(kv_heads * width).view(kv_heads, width)
    if attention.rotary:
        pairs = torch.stack([torch.arange(width // 2), torch.arange(width // 2) + width // 2], dim=1)
    else:
        pairs = torch.arange(width).view(width, 1)
    key_pairs = key[:, pairs].flatten(0, 1)
    query_pairs = query[:, :, pairs].transpose(1, 2).flatten(2).flatten(0, 1)
    whole_heads = query.view(-1, width)
    couplings = [
        Coupling(
            "value dimension",
            (
                Side(prefix + attention.value, "rows", key.reshape(-1, 1)),
                Side(prefix + attention.output, "columns", query.transpose(1, 2).reshape(-1, shared)),
            ),
        ),
        Coupling(
            "query head",
            (Side(prefix + attention.output, "columns", whole_heads),),
            followers=(Side(prefix + attention.query, "rows", whole_heads),),
            candidate=False,
        ),
    ]
    if not attention.head_norms:
        sides = (Side(prefix + attention.query, "rows", query_pairs), Side(prefix + attention.key, "rows", key_pairs))
        couplings.append(Coupling("query/key pair", sides))
    return couplings


def _neuron_coupling(feed_forward: FeedForward, block: nn.Module, prefix: str) -> Coupling:
    neurons = torch.arange(_shape(block, feed_forward.output)[1]).view(-1, 1)
    inputs = tuple(Side(prefix + name, "rows", neurons) for name in feed_forward.inputs)
    return Coupling("neuron", (*inputs, Side(prefix + feed_forward.output, "columns", neurons)))


def _narrow_axes(feed_forward: FeedForward, prefix: str, layers: dict[str, LinearLayer]) -> set[tuple[str, str]]:
    """Neurons narrow the hidden tensor if every layer that makes or reads it is pruned."""
    names = [prefix + name for name in feed_forward.inputs]
    if any(name not in layers for name in [*names, prefix + feed_forward.output]):
        return set()
    return {(name, "rows") for name in names} | {(prefix + feed_forward.output, "columns")}


def _restrict(couplings: list[Coupling], layers: dict[str, LinearLayer]) -> tuple[Coupling, ...]:
    """Leave out what concerns layers that are not pruned; a coupling without a partner says nothing."""

    def known(sides: Sequence[Side]) -> tuple[Side, ...]:
        return tuple(side for side in sides if side.layer in layers)

    kept = (replace(c, sides=known(c.sides), followers=known(c.followers)) for c in couplings)
    return tuple(c for c in kept if c.sides and len(c.sides) + len(c.followers) > 1)


def to_index(mask: Tensor) -> Tensor:
    """Positions of the True entries of a one-dimensional mask."""
    return mask.nonzero().flatten()
