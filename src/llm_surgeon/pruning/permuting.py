"""Channel permutation for N:M: orders of a model's channels, found by scores and folded into the weights.

Each set of channels whose order is free has one permutation: the neurons of a block, the dimensions within a value
head, and the residual stream, with one order for the whole model (``models/permutation.py``).
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

# Largest number of rows of a layer that vote on the order of the residual stream: all layers of the model vote, and
# their scores have to be held at once.
_ROWS = 512

ScoreOf = Callable[[LinearLayer], Tensor]


class StreamOrder:
    """Order of the residual stream, found from the scores of all layers that read the stream."""

    def __init__(self, family: Family, pattern: Pattern) -> None:
        self._readers = {name for part in family.parts for name in part.readers}
        self._family, self._pattern = family, pattern
        self._scores: list[Tensor] = []

    def hear(self, layers: Iterable[LinearLayer], score: ScoreOf) -> None:
        """Collect the votes of a block's layers; ``score`` gives the scores ``[R, C]`` of a layer."""
        for layer in layers:
            if _path_in_block(layer, self._family) in self._readers:
                scores = score(layer)
                # Scores of different layers have different scales, and cannot be compared.
                scores = scores[:: -(-len(scores) // _ROWS)]
                self._scores.append(scores / scores.mean().clamp(min=torch.finfo(scores.dtype).tiny))

    def fold(self, model: PreTrainedModel) -> None:
        """Reorder the residual stream, if any prunable layer reads it."""
        if self._scores:
            order = find_permutation(torch.cat(self._scores), self._pattern)
            fold_residual(model, self._family, order)


def reorder_block(
    model: PreTrainedModel, family: Family, layers: Iterable[LinearLayer], score: ScoreOf, pattern: Pattern
) -> None:
    """Reorder the channels inside the parts of a block, as far as the layers that read them are prunable.

    Args:
        model: The model, changed in place; its function stays the same.
        family: Entry of the model's architecture.
        layers: Prunable layers of one block.
        score: Function that gives the scores ``[R, C]`` of a layer.
        pattern: The N:M pattern.
    """
    for layer in layers:
        prefix = layer.name.removesuffix(_path_in_block(layer, family))
        block = model.get_submodule(prefix[:-1])
        settings = family.settings_of(model.config)
        parts = [part for e in family.parts if (part := e.locate(settings, block, layer.block, prefix))]
        for order in (order for part in parts for order in part.orders() if order.reader.layer == layer.name):
            # If groups of inputs cross the edge of a set, an order within sets has no use.
            if order.channels % pattern.group == 0:
                scores = score(layer)[:, order.reader.index]
                found = [find_permutation(scores[:, one].flatten(0, 1), pattern) for one in range(order.sets)]
                fold_order(model, order, torch.stack(found))


def _path_in_block(layer: LinearLayer, family: Family) -> str:
    return layer.name.removeprefix(f"{family.blocks}.{layer.block}.")
