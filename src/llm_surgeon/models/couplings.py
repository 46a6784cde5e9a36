"""What lives and dies together within a block: neurons, dimensions of heads, heads, and whole parts of the block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from llm_surgeon.mathematics.keep_masks import Axis, Coupling, Side
from llm_surgeon.models.parts import AttentionPart, FeedForwardPart, Rows


def attention_couplings(part: AttentionPart, norms: bool) -> Iterator[Coupling]:
    """What dies together in an attention, from single dimensions to the whole of it.

    A value row feeds the same column of every query head that shares its key/value head. A query dimension meets
    the key dimension of the same number; rotary embeddings rotate two dimensions into each other, so both of the
    pair have to be dead. If the output projection reads nothing of a query head, its queries are without effect; if
    it reads nothing of all that share a key/value head, neither are the keys and values.

    Args:
        part: The attention.
        norms: Whether queries and keys are normed, so that they do not die together.
    """
    output, value = part.output.index, part.value.index
    yield Coupling(
        "value dimension",
        (_rows(part.value, value.reshape(-1, 1)), _columns(part.output, output.transpose(1, 2).flatten(0, 1))),
    )
    yield Coupling(
        "query head",
        (_columns(part.output, output.flatten(0, 1)),),
        followers=(_rows(part.query, part.query.index.flatten(0, 1)),),
        pools=torch.arange(part.kv).repeat_interleave(part.shared),
    )
    yield Coupling(
        "key/value group",
        (_columns(part.output, output.flatten(1)), _rows(part.value, value)),
        followers=(_rows(part.query, part.query.index.flatten(1)), _rows(part.key, part.key.index)),
    )
    yield Coupling(
        "attention",
        (_columns(part.output, output.reshape(1, -1)), _rows(part.value, value.reshape(1, -1))),
        followers=(_rows(part.query, part.query.index.reshape(1, -1)), _rows(part.key, part.key.index.reshape(1, -1))),
    )
    if not norms:
        yield from _query_key_couplings(part)


def _query_key_couplings(part: AttentionPart) -> Iterator[Coupling]:
    """Pairs of rotated dimensions, and single dimensions that are not rotated."""
    half = part.rotated // 2
    pairs = torch.stack([torch.arange(half), torch.arange(half) + half], dim=1)
    single = torch.arange(part.rotated, part.width).view(-1, 1)
    for kind, dimensions in (("query/key pair", pairs), ("query/key dimension", single)):
        if len(dimensions):
            query = part.query.index[:, :, dimensions].transpose(1, 2).flatten(2).flatten(0, 1)
            key = part.key.index[:, dimensions].flatten(0, 1)
            yield Coupling(kind, (_rows(part.query, query), _rows(part.key, key)))


def feed_forward_couplings(part: FeedForwardPart) -> Iterator[Coupling]:
    """Neurons, and all of them."""
    for kind, shape in (("neuron", (-1, 1)), ("feed-forward", (1, -1))):
        inputs = (_rows(rows, rows.index.view(shape)) for rows in part.inputs)
        yield Coupling(kind, (_columns(part.output, part.output.index.view(shape)), *inputs))


def _rows(rows: Rows, index: Tensor) -> Side:
    return _side(rows, "rows", index)


def _columns(rows: Rows, index: Tensor) -> Side:
    return _side(rows, "columns", index)


def _side(rows: Rows, axis: Axis, index: Tensor) -> Side:
    return Side(rows.layer, axis, index)
