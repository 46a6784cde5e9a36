"""A structure of one's own: a neuron of one block goes together with the same neuron of the next block."""

from __future__ import annotations

from llm_surgeon.mathematics.keep_masks import Coupling
from llm_surgeon.models.parts.feed_forward import FeedForwardPart
from llm_surgeon.models.parts.part import columns_of, rows_of
from llm_surgeon.recipe.structures import StructureRow

ROW = StructureRow("neurons of two blocks", "pairs of neurons", uniform=True, multiple=4, min_width=0.1)


def couplings(anatomy):
    """Neurons of the first two blocks, of the next two, and so on; a pair costs as much as the cheaper of its two."""
    parts = [part for part in anatomy.located if isinstance(part, FeedForwardPart)]
    for pair in zip(parts[::2], parts[1::2], strict=False):
        sides = []
        for part in pair:
            sides.append(columns_of(part.output, part.output.index.view(-1, 1)))
            sides += [rows_of(rows, rows.index.view(-1, 1)) for rows in part.inputs]
        yield Coupling("twin", tuple(sides), structure="twins")
