"""Truths of every loop: inherit ``LoopContract`` and give it the options of a recipe as the fixture ``options``."""

import copy
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

import tiny
from extensions.shown import Shown
from llm_surgeon import PruneConfig
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import core_of
from llm_surgeon.pruning.loops import loop_of
from llm_surgeon.refit.stages import phase_names, with_dense
from llm_surgeon.session.session import Session

SMALL = {"preset": "none", "samples": 4, "seq_len": 12, "sparsity": 0.5, "precision": "float32"}


@dataclass
class Taken:
    """A loop that has run to its end.

    Attributes:
        session: Its session, with the model as the last shot has left it.
        results: The result of each shot.
        models: A copy of the model after each shot.
    """

    session: Session
    results: list
    models: list

    @property
    def weights(self):
        return {name: tensor.clone() for name, tensor in self.session.model.state_dict().items()}


def take(session, since=None):
    """Run a session's loop to its end."""
    taken = Taken(session, [], [])
    for result in loop_of(session.config).run(session, since):
        taken.results.append(result)
        taken.models.append(copy.deepcopy(session.model))
    return taken


def assert_same_bits(some, others):
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


class LoopContract:
    """Shots in order, masks that agree with the model, progress as announced, the same weights from seed and state."""

    @pytest.fixture
    def options(self):
        raise NotImplementedError("a subclass gives the options of its recipe")

    @pytest.fixture
    def session(self, options):
        """Makes a session on the same dense model and tokens."""

        def make():
            model = tiny.build("llama-biased")
            anatomy = examine(model, family_of("llama"))
            config = PruneConfig.from_mapping(SMALL | options)
            tokens = CalibrationTokens(tiny.tokens(config.samples, config.seq_len), None, {})
            return with_dense(Session(model, anatomy, tokens, config, Shown()))

        return make

    def test_shots_come_in_order_and_remove_more_and_more(self, session):
        taken = take(session())
        config = taken.session.config
        assert [result.shot for result in taken.results] == list(range(1, config.shots + 1))
        assert [result.target_sparsity for result in taken.results] == config.sparsity_schedule
        dense = taken.session.anatomy.prunable_weights
        left = [dense, *(sum(mask.weights for mask in result.masks.values()) for result in taken.results)]
        assert all(after < before for before, after in pairwise(left))
        assert left[-1] / dense == pytest.approx(1 - config.sparsity, abs=0.01)

    def test_masks_agree_with_the_model_after_each_shot(self, session):
        taken = take(session())
        for result, model in zip(taken.results, taken.models, strict=True):
            assert list(result.masks) == list(taken.session.anatomy.layers)
            for name, mask in result.masks.items():
                weight = core_of(model, taken.session.anatomy.layers[name]).weight
                assert tuple(weight.shape) == mask.shape
                if not isinstance(mask, KeepMask):
                    assert not bool(weight[~mask.elements].any())

    def test_progress_adds_up_to_what_was_announced(self, session):
        shown = take(session()).session.progress
        assert shown.counted == shown.announced

    def test_phases_are_those_that_progress_shows(self, session):
        """In the same words and the same order, stages included."""
        taken = take(session())
        config, loop = taken.session.config, loop_of(taken.session.config)
        for result in taken.results:
            phases = [*loop.phases(config, result.shot), *phase_names(result.shot, config)]
            assert {stage.name for stage in result.stages} <= {name for _, name, _ in phases}
            shares = {}
            for _, name, share in phases:
                shares[name] = shares.get(name, 0.0) + share
            assert shares == pytest.approx(dict.fromkeys(shares, 1.0))
        words = [
            words
            for result in taken.results
            for words, *_ in (*loop.phases(config, result.shot), *phase_names(result.shot, config))
        ]
        assert list(dict.fromkeys(words)) == list(taken.session.progress.announced)

    def test_the_same_seed_gives_the_same_weights(self, session):
        assert_same_bits(take(session()).weights, take(session()).weights)

    def test_the_state_after_a_shot_leads_to_the_same_weights(self, session):
        whole = take(session())
        for result, model in zip(whole.results, whole.models, strict=True):
            resumed = take(replace(session(), model=copy.deepcopy(model)), result.state)
            assert [later.shot for later in resumed.results] == [later.shot for later in whole.results[result.shot :]]
            assert_same_bits(resumed.weights, whole.weights)
