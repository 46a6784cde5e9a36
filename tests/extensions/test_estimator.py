"""An estimator of one's own in one file: the whole Fisher of each layer, from its lines to a resumed run."""

import pytest
import torch
import yaml

from extensions.estimator_contract import DAMPING, EstimatorContract, small_model
from extensions.shown import Shown
from llm_surgeon import plan
from llm_surgeon.curvature.estimator import Curvature, Estimator
from llm_surgeon.curvature.estimators import ESTIMATORS, register_estimator
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.dense_fisher import DenseFisher
from llm_surgeon.models.matrix import core_of
from llm_surgeon.passes.hooks import Hooks, with_bias
from llm_surgeon.recipe.config import read_recipe
from llm_surgeon.recipe.methods import CURVATURES, METHODS
from llm_surgeon.recipe.methods import Curvature as CurvatureRow
from llm_surgeon.records import PruneReport


class ExactCurvature(Curvature):
    """The mean over tokens of ``vec(g a^T) vec(g a^T)^T`` for each layer, ``[RC, RC]``."""

    def __init__(self, sums, result):
        self._sums, self._result = sums, result

    @property
    def loss(self):
        return self._result.loss

    @property
    def nbytes(self):
        return sum(total.nbytes for total in self._sums.values())

    def fisher(self, layer, keep, damping):
        count = self._result.tokens * self._result.gradients_per_token
        return DenseFisher(self._sums[layer.name] / count, damping.g, layer.name)


class ExactEstimator(Estimator):
    """The whole Fisher of each layer; takes a matrix as large as the square of the layer's weights."""

    name = "exact"

    def estimate(self, task, start):
        sums = {}
        with Hooks() as hooks:
            for name, layer in task.anatomy.layers.items():
                core = core_of(task.model, layer)
                size = core.out_features * (core.in_features + layer.bias)
                sums[name] = torch.zeros(size, size, device=task.device)
                hooks.on_pair(core, self._adder(sums[name], layer.bias))
            result = task.run(hooks, backward=True)
        task.processes.add_up(sums.values())
        return ExactCurvature(sums, result)

    @staticmethod
    def _adder(total, bias):
        def add(inputs, gradients):
            each = (gradients.float()[:, :, None] * with_bias(inputs, bias).float()[:, None, :]).flatten(1)
            total.addmm_(each.T, each)

        return add

    def operations(self, layers, how):
        return sum(2.0 * (layer.rows * (layer.columns + layer.bias)) ** 2 for layer in layers)


ROW = CurvatureRow("the whole Fisher of each layer")
# The two blocks of the tiny checkpoint, but for the layers that a dense Fisher is slow for.
OPTIONS = {"curvature": "exact", "ignore": ["gate_proj", "up_proj", "down_proj"]}
SIZES = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}


@pytest.fixture
def exact():
    """The estimator in the tables, for the time of a test."""
    before = dict(ESTIMATORS), dict(CURVATURES), dict(METHODS)
    register_estimator(ExactEstimator(), ROW, methods=("surgeon", "k-obd"))
    yield
    for table, rows in zip((ESTIMATORS, CURVATURES, METHODS), before, strict=True):
        table.clear()
        table.update(rows)
        assert list(table) == list(rows)
    assert "exact" not in CURVATURES


class TestTheContract(EstimatorContract):
    @pytest.fixture
    def estimator(self):
        return ExactEstimator()

    def test_the_diagonal_is_that_of_the_diagonal_estimator(self, estimator):
        task, other = (self.task(each, small_model()) for each in (estimator, ESTIMATORS["diagonal"]))
        diagonal = ESTIMATORS["diagonal"].estimate(other, None)
        curvature = estimator.estimate(task, None)
        for name, layer in task.anatomy.layers.items():
            weight = torch.ones(layer.rows, layer.columns + layer.bias)
            found, expected = (each.fisher(layer, task.keep[name], DAMPING) for each in (curvature, diagonal))
            torch.testing.assert_close(
                found.element_costs(weight, correlated=False), expected.element_costs(weight, correlated=False)
            )


def test_without_its_row_no_recipe_can_name_it(small_recipe):
    with pytest.raises(ConfigError, match="curvature"):
        small_recipe(**OPTIONS)


def test_a_recipe_can_name_it(exact, small_recipe):
    assert small_recipe(**OPTIONS).resolved_curvature == "exact"
    assert yaml.safe_load(small_recipe(**OPTIONS).to_yaml())["curvature"]["approximation"] == "exact"
    with pytest.raises(ConfigError, match="l-obd"):
        small_recipe(**OPTIONS, method="l-obd")


def test_a_name_is_registered_once(exact):
    with pytest.raises(ValueError, match="taken"):
        register_estimator(ExactEstimator(), ROW, methods=())


def test_the_plan_counts_its_factors_and_its_pass(exact, small_recipe, checkpoint):
    phases, kfac = (
        {phase.name: phase for phase in plan(checkpoint, small_recipe(**(OPTIONS | changes))).phases}
        for changes in ({}, {"curvature": "kfac"})
    )
    assert phases["curvature"].host["factors"] == 2 * sum(4 * (rows * columns) ** 2 for rows, columns in SIZES.values())
    assert phases["curvature"].host["passes"] > 0
    assert phases["curvature"].seconds > 10 * kfac["curvature"].seconds


def test_a_run_with_it_is_reported_and_goes_on_after_an_interrupt(exact, small_recipe, run_and_resume):
    config, shown = small_recipe(**OPTIONS), Shown()
    directory, report = run_and_resume(config, progress=shown)
    assert shown.counted == shown.announced
    assert shown.announced["shot 1/2: curvature"] == config.samples * config.seq_len
    assert list(shown.planned)[:-2] == list(shown.announced)
    assert PruneReport.model_validate_json((directory / "report.json").read_text()).config["curvature"] == "exact"
    assert "\ncurvature: exact\n" in (directory / "report.html").read_text()
    assert read_recipe(directory / "recipe.yaml")["curvature"] == "exact"
    assert [shot.loss is None for shot in report.shots] == [False, False]
    assert report.shots[-1].sparsity == pytest.approx(0.3, abs=0.01)
    assert report.memory.factors == 2 * sum(4 * (rows * columns) ** 2 for rows, columns in SIZES.values())
