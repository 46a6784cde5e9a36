import pytest
import torch
from torch.nn import functional as F

from llm_surgeon.curvature import Estimation, estimate
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import NonFiniteError
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.modes import frozen
from llm_surgeon.passes.head import Head, head_loss, label_positions
from llm_surgeon.session.session import Session
from tiny import BUILDERS, build, tokens


def calibration(input_ids, mask=None):
    return CalibrationTokens(input_ids, mask, {})


def factors(model, input_ids, mask=None, batch_size=3):
    anatomy = examine(model, family_of(model.config.model_type))
    keep = anatomy.dense_masks()
    session = Session(model, anatomy, calibration(input_ids, mask))
    curvature = estimate(session, keep, Estimation(batch_size=batch_size, precision="float32"))
    return anatomy, {
        name: (curvature.input_factor(layer, keep[name]), curvature.gradient_factor(layer))
        for name, layer in anatomy.layers.items()
    }


def weight_gradients(model, anatomy, input_ids):
    """Gradient of the summed loss for each layer's matrix with its bias, ``[R, C]``."""
    model.zero_grad()
    logits = model(input_ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum").backward()
    result = {}
    for name, layer in anatomy.layers.items():
        module = model.get_submodule(name)
        parts = [module.weight.grad] + ([module.bias.grad[:, None]] if layer.bias else [])
        result[name] = torch.cat(parts, 1).clone()
    return result


@pytest.mark.parametrize("family", BUILDERS)
def test_one_token_gives_the_exact_fisher(family):
    """With one labelled token a gradient is one outer product, and K-FAC is exact."""
    model = build(family)
    input_ids = tokens(1, 2)
    anatomy, found = factors(model, input_ids)
    for name, gradient in weight_gradients(model, anatomy, input_ids).items():
        a, g = found[name]
        exact = torch.outer(gradient.flatten(), gradient.flatten())
        torch.testing.assert_close(torch.kron(g, a), exact, rtol=1e-3, atol=1e-5 * float(exact.abs().max()) + 1e-12)


@pytest.mark.parametrize("family", BUILDERS)
def test_factors_equal_hooked_sums_of_a_plain_backward_pass(family):
    """Inputs and output gradients collected by plain autograd on the whole model, biases and all."""
    model = build(family)
    input_ids = tokens(5, 7)
    anatomy, found = factors(model, input_ids)
    inputs, outputs = {}, {}
    handles = []
    for name in anatomy.layers:

        def remember(_module, arguments, output, name=name):
            inputs[name] = arguments[0].detach()
            output.retain_grad()
            outputs[name] = output

        handles.append(model.get_submodule(name).register_forward_hook(remember))
    logits = model(input_ids).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    count = input_ids.shape[0] * (input_ids.shape[1] - 1)
    for name, layer in anatomy.layers.items():
        x = inputs[name].reshape(5, 7, -1)[:, :-1].flatten(0, 1).double()
        if layer.bias:
            x = torch.cat([x, torch.ones(len(x), 1)], 1)
        y = outputs[name].grad.reshape(5, 7, -1)[:, :-1].flatten(0, 1).double()
        a, g = found[name]
        torch.testing.assert_close(a.double(), x.T @ x / count, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(g.double(), y.T @ y / count, rtol=1e-3, atol=1e-5)


def test_independent_inputs_and_gradients_give_the_exact_fisher():
    """On the product of a set of inputs and a set of gradients, the mean of kron is the kron of the means."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    gradients = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    exact = sum(torch.outer(v := torch.outer(g, a).flatten(), v) for a in inputs for g in gradients) / (
        len(inputs) * len(gradients)
    )
    a, g = inputs.T @ inputs / len(inputs), gradients.T @ gradients / len(gradients)
    torch.testing.assert_close(torch.kron(g, a), exact, rtol=1e-12, atol=1e-12)


def test_batch_size_does_not_matter():
    model = build("llama")
    _, one = factors(model, tokens(6, 9), batch_size=1)
    _, all_together = factors(model, tokens(6, 9), batch_size=6)
    for name, (a, g) in one.items():
        torch.testing.assert_close(a, all_together[name][0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(g, all_together[name][1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(family, side):
    model = build(family)
    sentence = tokens(4, 6)
    _, plain = factors(model, sentence)
    filler = torch.zeros(4, 3, dtype=torch.long)
    real, padding = torch.ones(4, 6, dtype=torch.bool), torch.zeros(4, 3, dtype=torch.bool)
    order = (sentence, filler) if side == "right" else (filler, sentence)
    mask = (real, padding) if side == "right" else (padding, real)
    _, padded = factors(model, torch.cat(order, 1), torch.cat(mask, 1))
    for name, (a, g) in plain.items():
        torch.testing.assert_close(a, padded[name][0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(g, padded[name][1], rtol=1e-3, atol=1e-4)


def test_label_positions_leave_out_the_last_token_and_padding():
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    positions, labels = label_positions(ids, mask)
    assert positions.tolist() == [0, 1, 2, 4]
    assert labels.tolist() == [2, 3, 4, 6]
    assert label_positions(ids, None)[1].tolist() == [2, 3, 4, 6, 0, 0]


@pytest.mark.parametrize("family", BUILDERS)
def test_chunked_head_gives_the_loss_and_gradient_of_the_whole_model(family, monkeypatch):
    monkeypatch.setattr("llm_surgeon.passes.head.CHUNK", 5)
    model = build(family)
    input_ids = tokens(2, 7)
    positions, labels = label_positions(input_ids, None)
    hidden = model.base_model(input_ids=input_ids).last_hidden_state.detach()
    flat = hidden.flatten(0, 1)[positions].requires_grad_()
    gradient = torch.empty_like(flat)
    total = head_loss(model, flat, labels, gradient)
    assert head_loss(model, flat, labels) == pytest.approx(total)
    logits = model(input_ids).logits.detach().flatten(0, 1)[positions]
    assert total == pytest.approx(float(F.cross_entropy(logits, labels, reduction="sum")), rel=1e-5)
    expected = torch.autograd.grad(F.cross_entropy(Head(model)(flat), labels, reduction="sum"), flat)[0]
    torch.testing.assert_close(gradient, expected)


def test_shared_inputs_share_one_sum():
    model = build("llama")
    anatomy = examine(model, family_of(model.config.model_type))
    session = Session(model, anatomy, calibration(tokens()))
    curvature = estimate(session, anatomy.dense_masks(), Estimation(batch_size=4, precision="float32"))
    assert len(curvature.gradients) == 14
    assert len(curvature.inputs) == 8


def test_the_model_is_left_as_it_was():
    model = build("llama").train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    precision = torch.get_float32_matmul_precision()
    factors(model, tokens(2, 4))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.training
    assert model.model.layers[0].training
    assert torch.get_float32_matmul_precision() == precision
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_and_state_are_restored_when_the_pass_fails():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="not finite"):
        factors(model, tokens(2, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_frozen_restores_mixed_states():
    model = build("opt")
    model.model.decoder.layers[0].train()
    with frozen(model):
        assert not any(m.training for m in model.modules())
    assert model.model.decoder.layers[0].training
    assert not model.model.decoder.layers[1].training


def test_bfloat16_arithmetic_gives_nearly_the_same_factors_and_they_stay_definite():
    model = build("llama")
    anatomy = examine(model, family_of(model.config.model_type))
    keep = anatomy.dense_masks()
    exact, reduced = (
        estimate(
            Session(model, anatomy, calibration(tokens(16, 32))), keep, Estimation(batch_size=4, precision=precision)
        )
        for precision in ("float32", "bfloat16")
    )
    for name, layer in anatomy.layers.items():
        for read in (
            lambda c, n=name, la=layer: c.input_factor(la, keep[n]),
            lambda c, la=layer: c.gradient_factor(la),
        ):
            x, y = read(exact), read(reduced)
            assert y.dtype == torch.float32
            assert float((x - y).norm() / x.norm()) < 0.05
            assert float(torch.linalg.eigvalsh(y.double()).min()) > -1e-4 * float(y.diagonal().mean())
