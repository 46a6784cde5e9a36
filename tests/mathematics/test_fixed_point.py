"""Gram matrices in 8-bit fixed point against exact ones."""

import pytest
import torch

from llm_surgeon.curvature import Estimation, estimate
from llm_surgeon.curvature.gram import GramSum
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import NonFiniteError
from llm_surgeon.mathematics import fixed_point
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.modes import products
from llm_surgeon.session.session import Session
from tiny import build, tokens

pytestmark = pytest.mark.skipif(not hasattr(torch, "_int_mm"), reason="this torch has no product of 8-bit integers")


@pytest.mark.parametrize(("vnni", "amx"), [(False, False), (True, True), (True, False)])
def test_it_is_for_cpus_that_have_nothing_better(vnni, amx, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert fixed_point.is_fast(torch.device("cpu")) == (vnni and not amx)
    assert not fixed_point.is_fast(torch.device("cuda"))


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    # Slow where it is not fast, but the same.
    monkeypatch.setattr(fixed_point, "is_fast", lambda _device: True)


def heavy_tailed(count, size, seed=0):
    """Channels of very different scales with heavy tails, and two tokens that are large in one channel."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, size, generator=generator)
    x = x * x.abs() * torch.logspace(-3, 3, size)
    x[[0, count // 2], 5] = 500 * x[:, 5].abs().mean()
    return x


def gram_of(x, precision):
    total = GramSum(x.shape[1], "cpu")
    with products(precision):
        for part in x.split(300):
            total.add(part)
    return total.dense()


# The second is more than is rounded at once.
@pytest.mark.parametrize("count", [400, 1300])
def test_numbers_of_steps_are_what_was_rounded(count):
    x = heavy_tailed(count, 30)
    parts = fixed_point.rounded(x)
    kept = parts.numbers.any(1)
    assert len(parts.left) == 2 == int((~kept).sum())
    assert torch.equal(parts.left, x[[0, count // 2]])
    error = (parts.numbers * parts.step - x)[kept].abs()
    assert bool((error <= 0.5001 * parts.step).all())
    assert bool((parts.step * 127 <= 64.01 * x.abs().mean(0)).all())


@pytest.mark.parametrize("size", [30, 64, 200, 450])
def test_a_sum_is_close_to_the_exact_one(size):
    x = heavy_tailed(900, size)
    exact = (x.double().T @ x.double()).float()
    scale = exact.diagonal().sqrt()
    error = ((gram_of(x, "bfloat16") - exact) / scale / scale[:, None]).abs()
    assert 0 < error.max() < 5e-3
    assert error.diagonal().mean() < 2e-3
    # What so few tokens say of their distribution is known to 1 / sqrt(900) only.
    assert error.mean() < 1e-3
    assert float(torch.linalg.matrix_norm(gram_of(x, "float32") - exact)) < 1e-5 * float(exact.norm())


def test_a_sum_is_positive_semi_definite():
    # Fewer tokens than channels: the exact sum is singular, so that any error of the sum itself would show.
    x = heavy_tailed(100, 200)
    rounded = gram_of(x, "bfloat16")
    scale = rounded.diagonal().sqrt()
    lowest = torch.linalg.eigvalsh((rounded / scale / scale[:, None]).double())[0]
    assert lowest > -1e-5


def test_large_tokens_do_not_hide_the_others():
    # Beside a token of a million, everything else would be rounded to zero.
    x = torch.randn(512, 8, generator=torch.Generator().manual_seed(1))
    x[0] = 1e6
    parts = fixed_point.rounded(x)
    assert torch.equal(parts.left, x[:1])
    rest = x[1:]
    close = parts.numbers[1:] * parts.step
    torch.testing.assert_close(close.T @ close, rest.T @ rest, rtol=1e-2, atol=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value):
    x = heavy_tailed(100, 20)
    x[3, 7] = value
    total = gram_of(x, "bfloat16")
    assert not total[7].isfinite().any()
    assert not total[:, 7].isfinite().any()


def test_channels_of_zeros_give_zeros_and_hide_no_large_tokens():
    x = heavy_tailed(400, 20)
    x[:, 4] = 0.0
    assert len(fixed_point.rounded(x).left) == 2
    total = gram_of(x, "bfloat16")
    assert total.isfinite().all()
    assert not total[4].any()


def test_full_precision_does_not_round():
    x = heavy_tailed(300, 40)
    torch.testing.assert_close(gram_of(x, "float32"), x.T @ x, rtol=1e-4, atol=1e-4 * float(x.square().sum(0).max()))


@pytest.mark.parametrize("order", ["batch-major", "layer-major"])
def test_an_estimation_uses_it_where_less_than_float32_is_allowed(order, monkeypatch):
    model = build("llama")
    anatomy, text = examine(model, family_of("llama")), CalibrationTokens(tokens(4, 24), None, {})
    used = []
    rounded = fixed_point.rounded
    monkeypatch.setattr(fixed_point, "rounded", lambda x: used.append(x) or rounded(x))
    for precision in ("float32", "bfloat16"):
        used.clear()
        estimate(Session(model, anatomy, text), anatomy.dense_masks(), Estimation(2, precision, order=order))
        assert bool(used) == (precision == "bfloat16")


def test_damaged_weights_are_still_found(monkeypatch):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    anatomy, text = examine(model, family_of("llama")), CalibrationTokens(tokens(4, 24), None, {})
    with pytest.raises(NonFiniteError):
        estimate(Session(model, anatomy, text), anatomy.dense_masks(), Estimation(2, "bfloat16"))
