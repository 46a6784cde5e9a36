"""The kinds of part that the package has, in each layout that they come in."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.mathematics.keep_masks import Coupling
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.parts import AttentionPart, DeltaNetPart, columns_of, rows_of
from llm_surgeon.testing import FamilyChecks
from models.part_contract import PartContract, logits
from tiny import build


class OfBuilder(PartContract):
    @pytest.fixture(autouse=True, params=["llama-biased", "qwen3", "qwen3-5", "phi3", "gpt2", "gpt-neox", "opt"])
    def made(self, request):
        self.build = partial(build, request.param)
        self.family = family_of(self.build().config.model_type)
        self.entry = self.family.parts[self.place]


class TestAttention(OfBuilder):
    place = 0


class TestFeedForward(OfBuilder):
    place = -1


class TestDeltaNet(PartContract):
    build, family = staticmethod(partial(build, "qwen3-5")), family_of("qwen3_5_text")
    entry = family.parts[1]


def checks_of(kind):
    """Checks of a model with a gated attention and a delta net, and its part of a kind."""
    model, family = build("qwen3-5"), family_of("qwen3_5_text")
    checks = FamilyChecks(family, model, examine(model, family))
    (part,) = [part for part in checks.anatomy.parts if isinstance(part, kind)]
    return checks, part


@pytest.mark.parametrize("names", [("output", "value"), ("gate", "value"), ("query", "key"), ("key", "query")])
def test_what_is_normed_in_a_delta_net_does_not_die_with_what_it_meets(names):
    """A value that nothing reads still counts in the norm of its head, and so do a query and a key that meet none."""
    checks, part = checks_of(DeltaNetPart)
    sides = [columns_of if name == "output" else rows_of for name in names]
    rows = [getattr(part, name) for name in names]
    alone = Coupling("alone", (sides[0](rows[0], rows[0].index.reshape(-1, 1)),))
    wrong = replace(alone, followers=(sides[1](rows[1], rows[1].index.reshape(-1, 1)),))
    replace(checks, anatomy=replace(checks.anatomy, couplings=(alone,))).check_coupling(alone)
    with pytest.raises(UnsupportedModelError, match=r"what is said to be dead has an effect .*alone"):
        replace(checks, anatomy=replace(checks.anatomy, couplings=(wrong,))).check_coupling(wrong)


@pytest.mark.parametrize(
    ("kind", "name"), [(DeltaNetPart, "strength"), (DeltaNetPart, "decay"), (AttentionPart, "gate")]
)
def test_what_is_mapped_by_a_sigmoid_kills_nothing(kind, name):
    """Of a dead row the sigmoid is one half."""
    checks, part = checks_of(kind)
    keep, rows = checks.anatomy.dense_masks(), getattr(part, name)
    keep[rows.layer].rows[rows.index.flatten()] = False
    implied, halved = checks.implied(keep), logits(checks.masked(keep))
    assert all(torch.equal(implied[layer].rows, keep[layer].rows) for layer in part.layers)
    assert implied[part.output.layer].columns.all()
    keep[part.output.layer].columns.fill_(False)
    assert (logits(checks.masked(keep)) - halved).abs().max() > 1e-3
