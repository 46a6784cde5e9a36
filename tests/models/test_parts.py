"""The kinds of part that the package has, in each layout that they come in."""

from functools import partial

import pytest

from llm_surgeon.models import family_of
from models.part_contract import PartContract
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
