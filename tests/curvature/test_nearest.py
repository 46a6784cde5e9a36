"""Nearest Kronecker products, streamed over batches and passes, against the same iteration on samples in memory."""

import pytest
import torch
from torch.nn import functional as F

from llm_surgeon.curvature import Estimation, estimate, passes_needed
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.fisher import Damping, Diagonal, KroneckerProduct, SumOfTwo
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.mathematics.nearest_kronecker import nearest_kronecker_sum
from llm_surgeon.models import examine, family_of
from llm_surgeon.passes.hooks import with_bias
from llm_surgeon.session.session import Session
from tiny import BUILDERS, build, tokens

FAMILIES = pytest.mark.parametrize("family", BUILDERS)


def estimated(model, input_ids, curvature, batch_size=3, previous=None, precision="float32", **how):
    anatomy = examine(model, family_of(model.config.model_type))
    how = Estimation(batch_size=batch_size, precision=precision, curvature=curvature, **how)
    calibration = CalibrationTokens(input_ids, None, {})
    return anatomy, estimate(Session(model, anatomy, calibration), anatomy.dense_masks(), how, start=previous)


def samples(model, anatomy, input_ids):
    """Inputs with their bias coordinate, and output gradients, of every labelled token, by plain autograd."""
    inputs, outputs, handles = {}, {}, []
    for name in anatomy.layers:

        def hook(_module, arguments, output, name=name):
            output.retain_grad()
            inputs[name], outputs[name] = arguments[0].detach(), output

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    logits = model(input_ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    shape = input_ids.shape
    return {
        name: (
            with_bias(inputs[name].view(*shape, -1)[:, :-1].flatten(0, 1), layer.bias),
            outputs[name].grad.view(*shape, -1)[:, :-1].flatten(0, 1),
        )
        for name, layer in anatomy.layers.items()
    }


@FAMILIES
@pytest.mark.parametrize(("curvature", "terms"), [("nearest-kronecker", 1), ("kronecker-sum", 2)])
def test_passes_over_batches_are_the_iteration_in_memory(family, curvature, terms):
    model, input_ids = build(family), tokens(5, 7)
    anatomy, found = estimated(model, input_ids, curvature, iterations=2)
    for name, (a, g) in samples(model, anatomy, input_ids).items():
        expected = nearest_kronecker_sum(a, g, terms, 2)
        assert len(found.terms[name]) == terms
        for ours, theirs in zip(found.terms[name], expected, strict=True):
            for x, y in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))


@FAMILIES
def test_the_diagonal_is_that_of_the_exact_fisher(family):
    model, input_ids = build(family), tokens(5, 7)
    anatomy, found = estimated(model, input_ids, "diagonal")
    keep = anatomy.dense_masks()
    for name, (a, g) in samples(model, anatomy, input_ids).items():
        fisher = found.fisher(anatomy.layers[name], keep[name], Damping(0.1, 0.1))
        assert isinstance(fisher, Diagonal)
        expected = (g**2).T @ (a**2) / len(a)
        costs = fisher.element_costs(torch.ones_like(expected), correlated=False)
        torch.testing.assert_close(costs, expected / 2, rtol=1e-4, atol=1e-7 * float(expected.max()))


def test_sums_are_float32_in_bfloat16_passes_too():
    """A sum rounded to bfloat16 is indefinite, and has no Cholesky decomposition on a CPU."""
    anatomy, found = estimated(build("llama"), tokens(6, 8), "nearest-kronecker", precision="bfloat16", iterations=1)
    keep = anatomy.dense_masks()
    for name, layer in anatomy.layers.items():
        assert {factor.dtype for factor in found.terms[name][0]} == {torch.float32}
        fisher = found.fisher(layer, keep[name], Damping(0.01, 0.1))
        weight = torch.ones(layer.rows, layer.columns + layer.bias)
        assert bool((fisher.row_costs(weight, correlated=True) > 0).all())


def test_a_warm_start_takes_one_iteration_and_goes_on_where_the_last_ended():
    model, input_ids = build("llama"), tokens(6, 8)
    anatomy, once = estimated(model, input_ids, "kronecker-sum", iterations=1)
    start = once.warm_start(anatomy.layers, anatomy.dense_masks())
    _, more = estimated(model, input_ids, "kronecker-sum", iterations=5, previous=start)
    exact = {n: nearest_kronecker_sum(a, g, 1, 40)[0] for n, (a, g) in samples(model, anatomy, input_ids).items()}

    def distance(curvature):
        return sum(float((curvature.terms[n][0][1] - a).norm() / a.norm()) for n, (_, a) in exact.items())

    assert distance(more) < distance(once)
    how = Estimation(batch_size=1, precision="float32", curvature="kronecker-sum", iterations=3)
    assert (passes_needed(how, warm=False), passes_needed(how, warm=True)) == (12, 4)
    assert passes_needed(Estimation(batch_size=1, precision="float32"), warm=False) == 1


def test_a_warm_start_leaves_out_what_was_removed_meanwhile():
    _, found = estimated(build("opt"), tokens(6, 8), "nearest-kronecker", iterations=1)
    name = "model.decoder.layers.0.fc2"
    layer = next(iter([examine(m, family_of("opt")).layers[name] for m in [build("opt")]]))
    keep = KeepMask.dense(layer.rows, layer.columns)
    keep.columns[[0, 3]] = False
    a = found.terms[name][0][1]
    index = torch.tensor([i for i in range(layer.columns + 1) if i not in (0, 3)])
    torch.testing.assert_close(found.warm_start({name: layer}, {name: keep}).inputs[name][0], a[index][:, index])


def test_one_term_is_a_product_and_two_are_a_sum():
    model = build("llama")
    for curvature, kind in (("nearest-kronecker", KroneckerProduct), ("kronecker-sum", SumOfTwo)):
        anatomy, found = estimated(model, tokens(6, 8), curvature)
        name, layer = next(iter(anatomy.layers.items()))
        assert isinstance(found.fisher(layer, anatomy.dense_masks()[name], Damping(0.1, 0.1)), kind)
        assert found.nbytes == sum(
            2 * (2 if kind is SumOfTwo else 1) * (la.rows**2 + la.columns**2) * 2 for la in anatomy.layers.values()
        )


def test_what_would_not_fit_is_refused_before_any_pass_with_the_estimate(monkeypatch):
    monkeypatch.setattr("llm_surgeon.curvature.nearest.available_bytes", lambda _device: 1000)
    with pytest.raises(ConfigError, match=r"need about \d+\.\d GiB on cpu, where 0\.0 GiB are free.*--curvature kfac"):
        estimated(build("llama"), tokens(2, 4), "kronecker-sum")


class TestTrueFisher:
    """Labels sampled from the model."""

    def test_many_samples_approach_the_expectation_over_labels(self):
        """G of the last layer's output for one position, against the sum over the whole vocabulary."""
        model, input_ids = build("llama"), tokens(1, 2)
        anatomy, found = estimated(model, input_ids, "kfac", sampled_labels=4000)
        name = "model.layers.1.mlp.down_proj"
        total = 0.0
        probabilities = model(input_ids).logits[0, 0].detach().softmax(-1)
        for label, probability in enumerate(probabilities):
            labelled = torch.tensor([[int(input_ids[0, 0]), label]])
            # The label is the next token, which attention at its own position never reads.
            _, g = samples(model, anatomy, labelled)[name]
            total = total + probability * torch.outer(g[0], g[0])
        ours = found.gradient_factor(anatomy.layers[name])
        assert float((ours - total).norm() / total.norm()) < 0.1

    def test_labels_are_drawn_by_the_seed_and_the_loss_is_the_texts_own(self):
        model, input_ids = build("opt"), tokens(4, 8)
        name = "model.decoder.layers.0.fc1"
        runs = [estimated(model, input_ids, "kfac", sampled_labels=2, seed=seed) for seed in (1, 1, 2)]
        factors = [found.gradient_factor(anatomy.layers[name]) for anatomy, found in runs]
        assert torch.equal(factors[0], factors[1])
        assert not torch.allclose(factors[0], factors[2])
        _, empirical = estimated(model, input_ids, "kfac")
        assert runs[0][1].loss == pytest.approx(empirical.loss)
        anatomy = runs[0][0]
        torch.testing.assert_close(
            runs[0][1].input_factor(anatomy.layers[name], anatomy.dense_masks()[name]),
            empirical.input_factor(anatomy.layers[name], anatomy.dense_masks()[name]),
        )

    def test_labels_of_a_sequence_depend_neither_on_its_batch_nor_on_where_the_tokens_begin(self):
        model, input_ids = build("llama"), tokens(5, 8)
        anatomy, whole = estimated(model, input_ids, "kfac", sampled_labels=2, seed=3)
        layer = anatomy.layers["model.layers.0.mlp.down_proj"]
        expected = whole.gradient_factor(layer)
        _, batched = estimated(model, input_ids, "kfac", batch_size=2, sampled_labels=2, seed=3)
        torch.testing.assert_close(batched.gradient_factor(layer), expected)
        how = Estimation(3, "float32", sampled_labels=2, seed=3)
        text = CalibrationTokens(input_ids, None, {})
        first, last = (
            estimate(Session(model, anatomy, text.part(rows)), anatomy.dense_masks(), how).gradient_factor(layer)
            for rows in (slice(0, 2), slice(2, 5))
        )
        torch.testing.assert_close((2 * first + 3 * last) / 5, expected)


def test_activations_alone_need_no_gradient_and_no_data_is_read_for_the_identity():
    model, input_ids = build("llama"), tokens(4, 8)
    anatomy, found = estimated(model, input_ids, "activations")
    layer = anatomy.layers["model.layers.0.mlp.down_proj"]
    keep = anatomy.dense_masks()[layer.name]
    _, kfac = estimated(model, input_ids, "kfac")
    torch.testing.assert_close(found.input_factor(layer, keep), kfac.input_factor(layer, keep))
    assert found.gradient_factor(layer) is None
    assert found.loss == pytest.approx(kfac.loss)
    _, identity = estimated(model, input_ids, "identity")
    assert identity.loss is None
    assert identity.nbytes == 0
    assert identity.input_factor(layer, keep) is None
