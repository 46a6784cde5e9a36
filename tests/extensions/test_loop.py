"""A loop of one's own in one file: rows and columns that go at random, from its lines to a resumed run."""

import pytest
import torch

from extensions.loop_contract import LoopContract
from extensions.shown import Shown
from llm_surgeon import PruneConfig, plan
from llm_surgeon.errors import ConfigError
from llm_surgeon.models.matrix import narrow_heads, read_matrix, write_matrix
from llm_surgeon.pruning.loop import Loop
from llm_surgeon.pruning.loops import LOOPS, register_loop
from llm_surgeon.pruning.result import ShotResult
from llm_surgeon.pruning.structures import structure_of
from llm_surgeon.recipe.config import read_recipe
from llm_surgeon.recipe.methods import METHODS, Method, register_method
from llm_surgeon.records import PruneReport
from llm_surgeon.refit.stage import Shot
from llm_surgeon.refit.stages import Stages, phase_name
from llm_surgeon.system.clock import Clock


class RandomLoop(Loop):
    """Shots that remove rows and columns by lot."""

    name = "random"

    def run(self, session, since=None):
        config, structure, done = session.config, structure_of(session.config, session.anatomy), 0
        if since is not None:
            structure.resume(since.masks)
            done = since.shot
        stages = Stages(session)
        for number, sparsity in enumerate(config.sparsity_schedule[done:], start=done + 1):
            before, clock = structure.masks, Clock(session.device)
            layers, words = len(session.anatomy.layers), phase_name(number, config.shots, "update")
            with clock.phase("update"), session.progress.phase(words, layers, "layers") as phase:
                structure.resume(structure.random_masks(sparsity, config.seed + number))
                self._cut_out(session, before, structure.masks, phase)
            fitted = stages.run(Shot(number, structure.shapes), clock)
            yield ShotResult(
                shot=number,
                target_sparsity=sparsity,
                masks=structure.masks,
                threshold=None,
                removed=0,
                implied=0,
                factor_bytes=0,
                loss=None,
                costs=None,
                stages=clock.records(fitted),
                profile=clock.profile(),
            )

    @staticmethod
    @torch.no_grad()
    def _cut_out(session, before, after, phase):
        """Cut out of a model that may be pruned already."""
        extents = session.anatomy.extents(after)
        for name, layer in session.anatomy.layers.items():
            rows, columns = (after[name].axis(axis)[before[name].axis(axis)] for axis in ("rows", "columns"))
            if layer.bias:
                columns = torch.cat([columns, columns.new_ones(1)])
            matrix = read_matrix(session.model, layer)[rows][:, columns]
            write_matrix(session.model, layer, after[name], extents[name], matrix)
            phase.advance(1)
        narrow_heads(session.model, session.anatomy, after)

    def phases(self, config, shot):
        yield phase_name(shot, config.shots, "update"), "update", 1.0

    def passes(self, config):
        return 0


ROW = Method((), False, "a lottery", loop="random", course="drew them by lot")


@pytest.fixture
def lottery():
    """The loop and its method in the tables, for the time of a test."""
    before = dict(LOOPS), dict(METHODS)
    register_loop(RandomLoop())
    register_method("lottery", ROW)
    yield
    for table, rows in zip((LOOPS, METHODS), before, strict=True):
        table.clear()
        table.update(rows)
    assert "random" not in LOOPS
    assert "lottery" not in METHODS


CASES = {
    "rows and columns": {},
    "heads": {"structure": "values+neurons", "round_to": 1},
    "stage": {"reconstruction": True, "reconstruction_copies": 0},
}


@pytest.mark.usefixtures("lottery")
class TestTheContract(LoopContract):
    @pytest.fixture(params=list(CASES))
    def options(self, request):
        return {"method": "lottery", "shots": 2, **CASES[request.param]}

    def test_another_seed_gives_other_weights(self, session):
        first, second = session(), session()
        object.__setattr__(second, "config", second.config.model_copy(update={"seed": 1}))
        masks = [list(RandomLoop().run(each))[-1].masks for each in (first, second)]
        assert any(not torch.equal(mask.rows, masks[1][name].rows) for name, mask in masks[0].items())


def test_without_its_row_no_recipe_can_name_it():
    with pytest.raises(ConfigError, match="lottery"):
        PruneConfig.from_mapping({"method": "lottery"})


def test_a_recipe_can_name_it_and_it_has_no_curvature(lottery):
    config = PruneConfig.from_mapping({"method": "lottery", "shots": 2})
    assert config.loop == "random"
    assert config.resolved_curvature is None
    assert PruneConfig.from_mapping(config.resolved()).resolved() == config.resolved()
    with pytest.raises(ConfigError, match="takes no curvature"):
        PruneConfig.from_mapping({"method": "lottery", "curvature": "kfac"})
    with pytest.raises(ConfigError, match="gradient_share is for the curvature kfac, not for lottery"):
        PruneConfig.from_mapping({"method": "lottery", "gradient_share": 0.5})


def test_a_name_is_registered_once(lottery):
    with pytest.raises(ValueError, match="taken"):
        register_loop(RandomLoop())
    with pytest.raises(ValueError, match="taken"):
        register_method("lottery", ROW)


@pytest.mark.parametrize("order", ["auto", "layer-major"])
def test_the_plan_counts_no_pass_and_no_factors(lottery, small_recipe, checkpoint, order):
    phases = {phase.name: phase for phase in plan(checkpoint, small_recipe(method="lottery", order=order)).phases}
    assert phases["curvature"].seconds == 0.0
    assert phases["curvature"].host.get("factors", 0) == phases["curvature"].host["passes"] == 0
    assert phases["selection"].seconds < phases["export and check"].seconds


def test_a_run_with_it_is_reported_and_goes_on_after_an_interrupt(lottery, small_recipe, run_and_resume):
    shown = Shown()
    directory, report = run_and_resume(small_recipe(method="lottery"), progress=shown)
    assert shown.counted == shown.announced
    assert list(shown.planned)[:-2] == list(shown.announced)
    assert PruneReport.model_validate_json((directory / "report.json").read_text()).config["method"] == "lottery"
    assert "\nmethod: lottery\n" in (directory / "report.html").read_text()
    assert "The method `lottery` (a lottery) drew them by lot, and " in (directory / "README.md").read_text()
    assert read_recipe(directory / "recipe.yaml")["method"] == "lottery"
    assert [stage.name for stage in report.shots[0].stages] == ["update", "evaluation"]
    assert report.shots[-1].sparsity == pytest.approx(0.3, abs=0.01)


class SweepingLoop(RandomLoop):
    """The same, for one that goes from block to block."""

    sweeps = True

    def passes(self, config):
        return 1


def test_a_loop_that_sweeps_is_planned_by_what_it_says(lottery, small_recipe, checkpoint):
    """Its method is none of the table of layer-wise methods."""
    LOOPS["random"] = SweepingLoop()
    foreseen = plan(checkpoint, small_recipe(method="lottery"))
    assert foreseen.order == "layer-major"
    assert next(phase for phase in foreseen.phases if phase.name == "curvature").host["passes"] > 0
