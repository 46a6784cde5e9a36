"""Tiny models that have lost something, with what they were before."""

import torch

from choosing import choose, shrink
from llm_surgeon.mathematics.keep_masks import StructureCosts
from llm_surgeon.models import examine, family_of
from llm_surgeon.refit.reconstruction import dense_copy
from tiny import build


def pruned(family, ignore=(), share=0.4):
    """A tiny model with random rows and columns cut out, its dense copy, anatomy and masks."""
    model = build(family)
    anatomy = examine(model, family_of(model.config.model_type), ignore)
    dense = dense_copy(model, anatomy)
    generator = torch.Generator().manual_seed(1)
    keep = anatomy.dense_masks()
    costs = {
        name: StructureCosts(*(torch.rand(len(axis), generator=generator) for axis in (mask.rows, mask.columns)))
        for name, mask in keep.items()
    }
    keep = choose(keep, costs, anatomy.couplings, round((1 - share) * anatomy.prunable_weights)).keep
    shrink(model, anatomy, keep)
    return model, dense, anatomy, keep
