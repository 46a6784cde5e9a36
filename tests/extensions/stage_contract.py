"""The contract of stages after a shot: a test class inherits it, and says which stage and how a recipe has it."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from choosing import choose, shrink
from live_bytes import CountingRealTensors
from llm_surgeon import PruneConfig
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.mathematics.keep_masks import StructureCosts
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.skeleton import skeleton_of, weightless
from llm_surgeon.planning.trace import trace
from llm_surgeon.refit.stage import Shot
from llm_surgeon.refit.stages import STAGES, halves_of, stages_of, with_dense
from llm_surgeon.session.session import Session
from tiny import build, tokens

CPU = torch.device("cpu")
SIZES = {"samples": 8, "seq_len": 16, "batch_size": 2, "eval_window": 32, "precision": "float32", "preset": "none"}


class StageContract:
    """What plan, progress, checkpoints and the loop rely on.

    Attributes:
        stage: The stage.
        options: Options of a recipe that has it.
        elements: Whether it takes models that hold zeros in matrices of the old shape.
        family: The model.
        planned_to_real: Least and largest quotient of the planned and the real bytes of a fit.
    """

    stage = None
    options: ClassVar = {}
    elements = True
    family = "llama-biased"
    planned_to_real = (0.95, 1.05)

    def config(self, **changes):
        return PruneConfig.from_mapping({**SIZES, **self.options, **changes})

    def pruned(self, elements=False, **changes):
        """A session whose model has lost some of its rows and columns, or single weights, and the shot."""
        model = build(self.family)
        anatomy = examine(model, family_of(model.config.model_type))
        changes |= {"structure": "unstructured"} if elements else {}
        session = with_dense(
            Session(model, anatomy, CalibrationTokens(tokens(8, 16), None, {}), self.config(**changes))
        )
        generator, keep = torch.Generator().manual_seed(1), anatomy.dense_masks()
        if elements:
            left = {
                name: torch.rand(x.rows, x.columns, generator=generator) > 0.4 for name, x in anatomy.layers.items()
            }
            for name, kept in left.items():
                core_of(model, anatomy.layers[name]).weight.data.mul_(kept)
            return session, Shot(1, keep, left)
        costs = {
            name: StructureCosts(*(torch.rand(len(axis), generator=generator) for axis in (mask.rows, mask.columns)))
            for name, mask in keep.items()
        }
        keep = choose(keep, costs, anatomy.couplings, round(0.6 * anatomy.prunable_weights)).keep
        shrink(model, anatomy, keep)
        return session, Shot(1, keep)

    def fitted(self, half=None, **changes):
        """A session after a fit with all that a run does for it, the fit, and the tokens that were shown."""
        session, shot = self.pruned(**changes)
        stage, shown = self.stage(session), []
        stage.begin()
        work = stage.work(shot, half)
        found = stage.fit(shot, half, shown.append)
        assert work == sum(shown) > 0
        return session, shot, found

    def kinds(self):
        return (False, True) if self.elements else (False,)

    def test_it_is_a_row_of_the_table_and_off_by_default(self):
        assert STAGES[self.stage.name] is self.stage
        assert not self.stage.wanted(PruneConfig.from_mapping({"preset": "none"}))
        assert self.stage in stages_of(self.config())

    def test_it_changes_the_model(self):
        (before, _), (after, _, _) = self.pruned(), self.fitted()
        assert set(_differing(before.model, after.model))

    def test_progress_adds_up_to_the_work(self):
        for half in (None, *((0, 1) if self.stage.half != "whole" else ())):
            self.fitted(half)  # which compares them
        session, shot = self.pruned()
        stage = self.stage(session)
        if stage.half != "whole":
            assert sum(stage.work(shot, half) for half in (0, 1)) == stage.work(shot, None)

    def test_nothing_comes_back(self):
        for elements in self.kinds():
            (session, shot, _), (before, _) = self.fitted(elements=elements), self.pruned(elements=elements)
            shapes = {name: tensor.shape for name, tensor in before.model.state_dict().items()}
            assert {name: tensor.shape for name, tensor in session.model.state_dict().items()} == shapes
            for name, kept in (shot.elements or {}).items():
                weight = core_of(session.model, session.anatomy.layers[name]).weight
                assert not weight[~kept].any()

    def test_only_layers_and_what_it_names_change(self):
        for elements in self.kinds():
            (session, _, _), (before, _) = self.fitted(elements=elements), self.pruned(elements=elements)
            named = self.stage.changes(session.model, session.anatomy)
            assert set(named) <= dict(session.model.named_parameters()).keys()
            layers = tuple(f"{name}." for name in session.anatomy.layers)
            others = [name for name in _differing(before.model, session.model) if not name.startswith(layers)]
            assert set(others) <= set(named)
            if session.dense is not None:
                assert not _differing(before.dense, session.dense)

    def test_a_fit_is_the_same_every_time(self):
        (one, _, first), (other, _, second) = self.fitted(), self.fitted()
        assert not _differing(one.model, other.model)
        assert first == second

    def test_halves_are_different_texts(self):
        if self.stage.half == "whole":
            config = self.config().model_copy(update={"cross_fit": True})
            assert halves_of(self.stage, config) == [None]
            return
        (one, _, _), (other, _, _) = self.fitted(0), self.fitted(1)
        assert _differing(one.model, other.model)

    def test_figures_are_numbers_with_names_and_a_meaning(self):
        _, _, found = self.fitted()
        names = [figure.name for figure in found.figures]
        assert len(set(names)) == len(names)
        assert all(figure.value is None or math.isfinite(figure.value) for figure in found.figures)
        assert bool(found.figures) == bool(found.note)

    def planned(self, checkpoint, config):
        """The skeleton, and the bytes of the stage by what holds them."""
        order = "layer-major" if config.order == "layer-major" else "batch-major"
        skeleton = skeleton_of(str(checkpoint), config)
        traces = trace(lambda: weightless(skeleton, CPU), skeleton.anatomy, config, CPU, order)
        return skeleton, self.stage.memory(skeleton, config, traces)

    def test_a_fit_takes_the_memory_that_is_planned(self, checkpoint):
        config, model = self.config(), build("llama")
        anatomy = examine(model, family_of("llama"))
        session = with_dense(Session(model, anatomy, CalibrationTokens(tokens(8, 16), None, {}), config))
        stage, shot = self.stage(session), Shot(1, anatomy.dense_masks())
        stage.begin()
        # Weights have a place of their own in plans, also those of the dense model.
        models = [given for given in (model, session.dense) if given is not None]
        weights = [tensor for given in models for tensor in (*given.parameters(), *given.buffers())]
        with CountingRealTensors(weights) as live:
            stage.fit(shot, None, lambda _tokens: None)
            real = live.peak
        skeleton, parts = self.planned(checkpoint, config)
        planned = sum(parts.values()) + self.stage.waiting(skeleton, config, "batch-major")
        least, most = self.planned_to_real
        assert least * real <= planned <= most * real

    def test_a_plan_has_its_memory_and_operations(self, checkpoint):
        config = self.config()
        skeleton, parts = self.planned(checkpoint, config)
        assert all(isinstance(size, int) and size >= 0 for size in parts.values())
        assert sum(parts.values()) > 0
        left = [0.75, 0.5]
        operations = self.stage.operations(skeleton, config.model_copy(update={"shots": 2}), left, "batch-major")
        assert 0 < operations < math.inf


def _differing(one, other):
    """Names of tensors that are not equal bit by bit."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
