"""Truths of every estimator: inherit ``EstimatorContract`` and give it one as the fixture ``estimator``."""

from dataclasses import replace

import pytest
import torch

import choosing
import tiny
from llm_surgeon import PruneConfig
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.mathematics.fisher import Damping
from llm_surgeon.models import examine, family_of
from llm_surgeon.passes.batch_major import Estimation
from llm_surgeon.passes.task import Task
from llm_surgeon.pruning.shapes import Shapes
from llm_surgeon.session.session import Session
from llm_surgeon.system.storage import TensorStore

DAMPING = Damping(a=0.01, g=0.1)
SAMPLES, LENGTH = 6, 8
# A sum of float32 products in another order, and what a power iteration makes of it.
ROUNDING = {"rtol": 1e-3, "atol": 1e-6}


def small_model():
    """Two blocks with biases, so small that a dense Fisher of a layer is cheap."""
    torch.manual_seed(0)
    model = tiny.llama(
        hidden_size=16, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1, attention_bias=True
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.eval()


class EstimatorContract:
    """Finite factors, the same for any batches and in either order, as many bytes and passes as announced."""

    @pytest.fixture
    def estimator(self):
        raise NotImplementedError("a subclass gives its estimator")

    def task(self, estimator, model=None, keep=None, batch_size=3, order="batch-major", advance=lambda _: None):
        model = model or small_model()
        anatomy = examine(model, family_of(model.config.model_type))
        store = TensorStore(torch.device("cpu")) if order == "layer-major" else None
        session = Session(model, anatomy, CalibrationTokens(tiny.tokens(SAMPLES, LENGTH), None, {}), store=store)
        how = Estimation(batch_size, "float32", curvature=estimator.name, order=order)
        return Task(session, keep or anatomy.dense_masks(), how, advance)

    @torch.no_grad()
    def costs(self, estimator, task, correlated=False):
        """Costs of rows and of columns by layer."""
        curvature, found = estimator.estimate(task, None), {}
        for name, layer in task.anatomy.layers.items():
            fisher = curvature.fisher(layer, task.keep[name], DAMPING)
            module = task.model.get_submodule(name)
            module = getattr(module, "core", module)
            weight = module.weight if module.bias is None else torch.cat([module.weight, module.bias[:, None]], 1)
            rows = fisher.row_costs(weight, correlated=correlated)
            found[name] = rows, fisher.column_costs(weight, correlated=correlated)
        return found

    def assert_same(self, some, others):
        for name, pair in some.items():
            for one, other in zip(pair, others[name], strict=True):
                torch.testing.assert_close(one, other, **ROUNDING, msg=lambda words, name=name: f"{name}: {words}")

    @pytest.mark.parametrize("correlated", [True, False])
    def test_costs_are_finite_and_no_removal_is_a_gain(self, estimator, correlated):
        for costs in self.costs(estimator, self.task(estimator), correlated).values():
            for each in costs:
                assert bool(each.isfinite().all())
                assert float(each.min()) >= -1e-6 * float(each.max())
                assert bool(each.any())

    def test_a_neuron_without_weights_costs_nothing(self, estimator):
        model = small_model()
        with torch.no_grad():
            for name in ("gate_proj", "up_proj"):
                getattr(model.model.layers[0].mlp, name).weight[3] = 0.0
            model.model.layers[0].mlp.down_proj.weight[:, 3] = 0.0
        costs = self.costs(estimator, self.task(estimator, model))
        mlp = "model.layers.0.mlp"
        assert float(costs[f"{mlp}.gate_proj"][0][3]) == float(costs[f"{mlp}.up_proj"][0][3]) == 0.0
        assert float(costs[f"{mlp}.down_proj"][1][3]) == 0.0

    def test_a_neuron_that_nobody_reads_costs_nothing_where_gradients_say_so(self, estimator):
        if not estimator.backward:
            pytest.skip("reads no gradients")
        model = small_model()
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[:, 3] = 0.0
        rows = self.costs(estimator, self.task(estimator, model))["model.layers.0.mlp.up_proj"][0]
        assert float(rows[3]) == pytest.approx(0.0, abs=1e-6 * float(rows.max()))

    def test_a_neuron_that_never_fires_costs_nothing_where_inputs_say_so(self, estimator):
        if not estimator.passes(self.task(estimator).how, warm=False):
            pytest.skip("reads no tokens")
        model = small_model()
        with torch.no_grad():
            model.model.layers[0].mlp.gate_proj.weight[3] = 0.0
        columns = self.costs(estimator, self.task(estimator, model))["model.layers.0.mlp.down_proj"][1]
        assert float(columns[3]) == pytest.approx(0.0, abs=1e-6 * float(columns.max()))

    def test_the_size_of_the_batches_does_not_matter(self, estimator):
        one, all_of_them = (self.costs(estimator, self.task(estimator, batch_size=size)) for size in (1, SAMPLES))
        self.assert_same(one, all_of_them)

    def test_the_order_of_the_passes_does_not_matter(self, estimator):
        orders = "batch-major", "layer-major"
        self.assert_same(*(self.costs(estimator, self.task(estimator, order=order)) for order in orders))

    def test_bytes_are_within_those_planned(self, estimator):
        task = self.task(estimator)
        held = estimator.estimate(task, None).nbytes
        planned = estimator.factor_bytes(small_model().to("meta"), task.anatomy, task.how)
        # Beside the factors there may be parts that are summed.
        assert held <= planned <= 4 * held

    @pytest.mark.parametrize("order", ["batch-major", "layer-major"])
    def test_progress_counts_as_many_passes_as_announced(self, estimator, order):
        counted = []
        task = self.task(estimator, order=order, advance=counted.append)
        curvature = estimator.estimate(task, None)
        assert sum(counted) == SAMPLES * LENGTH * estimator.passes(task.how, warm=False)
        start = curvature.warm_start(task.anatomy.layers, task.keep)
        counted.clear()
        estimator.estimate(task, start)
        assert sum(counted) == SAMPLES * LENGTH * estimator.passes(task.how, warm=start is not None)

    def test_the_loss_is_that_of_the_tokens(self, estimator):
        task = self.task(estimator)
        loss = estimator.estimate(task, None).loss
        ids = tiny.tokens(SAMPLES, LENGTH)
        if estimator.backward:
            assert loss == pytest.approx(float(task.model(ids, labels=ids).loss.detach()), rel=1e-5)
        else:
            assert loss is None or loss >= 0.0

    def test_the_fisher_is_that_of_the_rows_and_columns_that_are_left(self, estimator):
        model = small_model()
        anatomy = examine(model, family_of(model.config.model_type))
        config = PruneConfig.from_mapping({"structure": "rows-columns", "sparsity": 0.4})
        keep = Shapes(config, anatomy).random_masks(0.4, seed=0)
        choosing.shrink(model, anatomy, keep)
        task = replace(self.task(estimator, keep=keep), session=Session(model, anatomy, self.task(estimator).tokens))
        for name, (rows, columns) in self.costs(estimator, task).items():
            assert rows.shape == (int(keep[name].rows.sum()),)
            assert columns.shape == (int(keep[name].columns.sum()) + anatomy.layers[name].bias,)
