"""What a family of models looks like: one declarative entry per architecture.

To support an architecture, write one ``Family`` in a file beside this one and list it in ``llm_surgeon.models``; or
write it in code of your own and hand it to ``register_family`` (``docs/families.md``). The contract suite
(``tests/models/test_contract.py``) then checks it on a tiny random model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# How the rows of queries, keys and values lie: each in a layer of their own; in one layer, all queries first, then
# all keys, then all values; in one layer, head by head (queries, keys and values of a head together).
Layout = Literal["separate", "stacked", "by head"]

# What an attribute of an attention module counts: query heads, key/value heads, query heads that share one of these,
# or the dimensions of all query heads.
Count = Literal["heads", "key/value heads", "shared", "width"]


@dataclass(frozen=True)
class Attention:
    """Names, within a block, of the attention and its linear layers.

    Heads are read from the configuration: ``num_attention_heads``, ``num_key_value_heads`` if it has them, and the
    head dimension from the width of the output matrix.

    Attributes:
        module: The attention itself, which is called with the hidden states and returns its output and something.
        query: The query projection.
        key: The key projection; the same name if it is one matrix with the queries.
        value: The value projection; the same name if it is one matrix with the queries.
        output: The output projection.
        rotary: Whether dimension d of a head is rotated together with d + rotated / 2, which ties the two; the number
            of rotated dimensions is read from the configuration.
        layout: How the rows of queries, keys and values lie.
        head_norms: Norms over the dimensions of each head of queries and keys. A dimension whose partner is dead
            still counts in the norm's denominator, so with them queries and keys do not die together.
        counts: Attributes of the module, and what of the heads they count: pruned attention has them set anew.
            ``config.NAME`` is an entry of the module's own configuration.
        free_heads: Whether the class builds itself with any number of heads from ``num_attention_heads``,
            ``num_key_value_heads`` and ``head_dim``, so that it needs no code of ours for fewer of them.
    """

    module: str
    query: str
    key: str
    value: str
    output: str
    rotary: bool
    layout: Layout = "separate"
    head_norms: tuple[str, ...] = ()
    counts: tuple[tuple[str, Count], ...] = ()
    free_heads: bool = True


@dataclass(frozen=True)
class FeedForward:
    """Names, within a block, of the linear layers of its feed-forward part.

    Attributes:
        inputs: Layers whose outputs are multiplied (gate and up) or the single first layer; each row is a neuron. The
            same name twice is one matrix with the rows of both, one after the other.
        output: The layer that reads the neurons.
        activation: The configuration's entry that names the activation, which must map 0 to 0.
        width: The configuration's entry with the number of neurons.
    """

    inputs: tuple[str, ...]
    output: str
    activation: str
    width: str = "intermediate_size"


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
        transposed: Whether its linear layers are ``Conv1D``, whose weights are stored ``[columns, rows]``.
    """

    model_type: str
    model_class: str
    config_class: str
    blocks: str
    attention: Attention
    feed_forward: FeedForward
    residual: Residual
    transposed: bool = False

    def short_name(self, kind: str) -> str:
        """The last part of a layer's name within a block, or all of it where two layers would have the same."""
        last = kind.rpartition(".")[2]
        names = {name for group in self.shared_inputs for name in group}
        return last if sum(name.rpartition(".")[2] == last for name in names) == 1 else kind

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
