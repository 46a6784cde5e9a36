"""Traced bytes against those of the same code on real tensors."""

from dataclasses import replace

import pytest
import torch

from live_bytes import CountingRealTensors
from llm_surgeon import PruneConfig
from llm_surgeon.curvature import Estimation, estimate, estimation_of
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.anatomy import straighten
from llm_surgeon.passes.task import Task
from llm_surgeon.planning.trace import _Nowhere, factor_bytes, trace
from llm_surgeon.refit.gates import gates_of, moments
from llm_surgeon.session.session import Session
from tiny import build, tokens

CPU = torch.device("cpu")
# One of each way to build a block: fused projections, the transposed layers of GPT-2, attention and MLP side by side,
# biases and learned positions, norms of queries and keys in sliding windows. Plain llama has the other tests.
FAMILIES = ("phi3", "gpt2", "gpt-neox", "opt", "gemma3", "mistral3-tower")
CURVATURES = {"kfac": "surgeon", "diagonal": "k-obd", "activations": "l-obd"}


def traced(model, **options):
    config = PruneConfig.from_mapping({"batch_size": 2, "seq_len": 16, "samples": 4, "eval_window": 32, **options})
    anatomy = examine(model, family_of(model.config.model_type))

    def weightless():
        network = type(model)(model.config)
        straighten(network, anatomy)
        return network

    order = "layer-major" if config.order == "layer-major" else "batch-major"
    return trace(weightless, anatomy, config, CPU, order), config, anatomy


def beside_weights(model):
    return CountingRealTensors([*model.parameters(), *model.buffers()])


def measured(model, anatomy, config, batch=2):
    """Bytes beside weights and factors at the peak of a real batch."""
    how = Estimation(config.sequences_per_pass, config.precision, config.resolved_curvature)
    ids = tokens(batch, config.seq_len)
    with beside_weights(model) as live:
        factors = estimate(Session(model, anatomy, CalibrationTokens(ids, None, {})), anatomy.dense_masks(), how)
        return live.peak - factors.nbytes, factors.nbytes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_pass_is_as_large_as_a_real_one(family, precision):
    model = build(family)
    traces, config, anatomy = traced(model, precision=precision)
    real, _ = measured(model, anatomy, config)
    # The masks of tiny tests' batches and the labels' positions are the only numbers that a trace has to guess.
    assert traces.curvature == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ["batch-major", "layer-major"])
def test_a_pass_for_gates_is_as_large_as_a_real_one(family, order):
    model = build(family)
    traces, config, anatomy = traced(model, gate_steps=1, order=order)
    how = Estimation(config.sequences_per_pass, config.precision, order=order)
    batch, gates = CalibrationTokens(tokens(2, config.seq_len), None, {}), gates_of(anatomy)
    with beside_weights(model) as live:
        moments(Task(Session(model, anatomy, batch, store=_Nowhere(CPU)), {}, how), gates)
    assert traces.stages["gates"] == pytest.approx(live.peak, rel=0.03)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_factors_are_those_of_an_estimation(curvature):
    model = build("llama-biased")
    traces, config, anatomy = traced(model, method=CURVATURES[curvature], curvature=curvature)
    real, factors = measured(model, anatomy, config)
    assert factor_bytes(model, anatomy, config) == factors
    assert traces.curvature == pytest.approx(real, rel=0.03)


@pytest.mark.parametrize("order", ["batch-major", "layer-major"])
def test_more_blocks_are_extrapolated_exactly(order, monkeypatch):
    model = build("llama")
    model = type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 9}))
    shallow = traced(model, gate_steps=1, order=order)[0]
    monkeypatch.setattr("llm_surgeon.planning.trace.DEPTH", 9)
    assert traced(model, gate_steps=1, order=order)[0] == shallow


def test_an_evaluation_window_is_as_large_as_a_real_one():
    model = build("llama")
    traces, config, _ = traced(model)
    text = EvaluationText(tokens(1, 32)[0], "text", 32, 32, config.precision)
    with beside_weights(model) as live:
        perplexity(model, text)
    assert traces.evaluation == pytest.approx(live.peak, rel=0.03)


def test_a_layerwise_method_keeps_the_hidden_states_of_all_tokens():
    traces, _, _ = traced(build("llama"), method="wanda")
    states = 2 * 16 * 24 * 4
    assert states <= traces.waiting < 2 * states
    assert traces.watching > 0
    assert traces.curvature == 0


def test_what_is_not_done_takes_nothing():
    traces, config, anatomy = traced(build("llama"), method="magnitude", evaluation="none")
    assert (traces.curvature, traces.evaluation, traces.stages) == (0, 0, {})
    assert factor_bytes(build("llama"), anatomy, config) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_do_not_count_where_an_operation_hands_out_views_of_them(dtype):
    """A linear layer works on a view of its weight; a plan that counted it would grow with the depth of the model."""
    model = build("llama").to(dtype)
    longer = type(model)(type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 4})).to(dtype)
    one, other = (traced(x, precision=str(dtype)[6:], method="wanda")[0] for x in (model, longer))
    assert one.evaluation == other.evaluation
    states = 2 * 16 * 24 * dtype.itemsize
    assert states <= one.waiting < 2 * states + 2 * 2 * 16 * 8 * 4
    assert one.waiting == other.waiting


def test_live_bytes_forget_what_is_gone():
    with CountingRealTensors() as live:
        first = torch.zeros(100)
        second = first + 1
        assert live.now == 800
        view = second[:10]
        del first, second
        assert live.now == 400
        del view
    assert (live.now, live.peak) == (0, 800)


def test_layer_by_layer_a_pass_does_not_grow_with_depth():
    model = build("llama")
    config = type(model.config)(**{**model.config.to_dict(), "num_hidden_layers": 9})
    shallow, deep = (traced(x, order="layer-major")[0].curvature for x in (model, type(model)(config)))
    assert deep == shallow


def test_layer_by_layer_a_pass_is_as_large_as_a_real_one():
    model = build("llama")
    traces, config, anatomy = traced(model, order="layer-major")
    store = _Nowhere(torch.device("cpu"))
    how = replace(estimation_of(config), order="layer-major")
    batch = CalibrationTokens(tokens(2, 16), None, {})
    with beside_weights(model) as live:
        estimate(Session(model, anatomy, batch, store=store), anatomy.dense_masks(), how)
    assert traces.curvature == pytest.approx(live.peak, rel=0.03)
