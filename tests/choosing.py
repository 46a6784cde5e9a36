"""Selections of rows and columns, and models without them, for tests that need some."""

import torch

from llm_surgeon.mathematics.candidates import bystanders, score_groups
from llm_surgeon.mathematics.keep_masks import StructureCosts
from llm_surgeon.mathematics.structured_selection import select
from llm_surgeon.models.anatomy import examine
from llm_surgeon.models.matrix import cut_out
from llm_surgeon.models.parts import AttentionPart, DeltaNetPart, FeedForwardPart
from llm_surgeon.pruning.shapes import LayerCosts

# Structures whose groups are too large to be scored by the sum of their members.
LARGE = ("heads", "blocks")


def attentions(anatomy):
    return [part for part in anatomy.parts if isinstance(part, AttentionPart)]


def delta_nets(anatomy):
    return [part for part in anatomy.parts if isinstance(part, DeltaNetPart)]


def feed_forwards(anatomy):
    return [part for part in anatomy.parts if isinstance(part, FeedForwardPart)]


def choose(keep, costs, couplings, target, per_weight=True):
    """As pruning of rows and columns does it: small groups are candidates, large ones only follow."""
    groups = [
        bystanders(coupling) if coupling.structure in LARGE else score_groups(keep, costs, coupling, per_weight)
        for coupling in couplings
    ]
    return select(keep, costs, groups, target, per_weight)


def shrink(model, anatomy, keep):
    """Cut what is not kept out of a model, without an update."""
    examine(model, anatomy.family)  # makes transposed layers plain
    cut_out(model, anatomy, keep)


@torch.no_grad()
def masked(model, anatomy, keep):
    """A model with zeros for removed rows (bias included) and columns."""
    examine(model, anatomy.family)  # makes transposed layers plain
    for name in anatomy.layers:
        module = model.get_submodule(name)
        module.weight[~keep[name].rows] = 0
        module.weight[:, ~keep[name].columns] = 0
        if module.bias is not None:
            module.bias[~keep[name].rows] = 0
    return model


def made_up_costs(structure, anatomy, draw):
    """Costs of everything that a structure that shrinks could lose, as many as are asked of ``draw``."""
    return {
        name: LayerCosts(
            StructureCosts(draw(layer.rows), draw(layer.columns)) if structure._singles else None,
            {key: draw(len(side.index)) for key, side in structure._sides.get(layer.name, ())},
        )
        for name, layer in anatomy.layers.items()
    }
