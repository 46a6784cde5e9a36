"""Channel permutation for N:M: which orders of channels there are in a model, found by scores and folded away.

Every order that layers agree on is one permutation: the neurons of a block, the dimensions within a value head, and
the residual stream with one order for the whole model (``models/permutation.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.mathematics.channel_permutation import find_permutation
from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.models.family import Family
from llm_surgeon.models.permutation import fold_order, fold_residual

# Rows of a layer that vote on the order of the residual stream, at most: all layers of the model do, and their scores
# have to be held at once.
_ROWS = 512

ScoreOf = Callable[[LinearLayer], Tensor]


class StreamOrder:
    """The order of the residual stream, found from the scores of all layers that read it."""

    def __init__(self, family: Family, pattern: Pattern) -> None:
        self._readers = {name for part in family.parts for name in part.readers}
        self._family, self._pattern = family, pattern
        self._scores: list[Tensor] = []

    def hear(self, layers: Iterable[LinearLayer], score: ScoreOf) -> None:
        """Take the votes of a block's layers; ``score`` gives ``[R, C]`` of a layer."""
        for layer in layers:
            if _path_in_block(layer, self._family) in self._readers:
                scores = score(layer)
                # Layers differ in scale, and no score compares them.
                scores = scores[:: -(-len(scores) // _ROWS)]
                self._scores.append(scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny))

    def fold(self, model: PreTrainedModel) -> None:
        """Reorder the stream, if anything reads it."""
        if self._scores:
            order = find_permutation(torch.cat(self._scores), self._pattern)
            fold_residual(model, self._family, order)


def reorder_block(
    model: PreTrainedModel, family: Family, layers: Iterable[LinearLayer], score: ScoreOf, pattern: Pattern
) -> None:
    """Reorder the channels inside the parts of a block, as far as the layers that read them are pruned.

    Args:
        model: Changed in place; its function is not.
        family: Its entry.
        layers: Prunable layers of one block.
        score: Gives ``[R, C]`` of a layer.
        pattern: N:M.
    """
    for layer in layers:
        prefix = layer.name.removesuffix(_path_in_block(layer, family))
        block = model.get_submodule(prefix[:-1])
        parts = [part for e in family.parts if (part := e.locate(model.config, block, layer.block, prefix))]
        for order in (order for part in parts for order in part.orders() if order.reader.layer == layer.name):
            # Where groups of inputs reach over the edge of a set, no order within sets is of use.
            if order.channels % pattern.group == 0:
                scores = score(layer)[:, order.reader.index]
                found = [find_permutation(scores[:, one].flatten(0, 1), pattern) for one in range(order.sets)]
                fold_order(model, order, torch.stack(found))


def _path_in_block(layer: LinearLayer, family: Family) -> str:
    return layer.name.removeprefix(f"{family.blocks}.{layer.block}.")
