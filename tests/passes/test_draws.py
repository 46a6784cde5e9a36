"""Gradients of some tokens, weighted, in place of those of all."""

from dataclasses import replace

import pytest
import torch

from llm_surgeon.curvature import Estimation, estimate
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models import examine, family_of
from llm_surgeon.passes.draws import TokenSample, draws_of
from llm_surgeon.session.session import Session
from tiny import BUILDERS, build, tokens

# All but the last token of each of two sequences of 40.
POSITIONS = torch.arange(80).view(2, 40)[:, :-1].flatten()


def rows(spread, size=6):
    """Gradients ``[2, 40, size]`` whose sizes spread over so many powers of e; none at the last token."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 40, size, generator=generator) * (spread * torch.randn(2, 40, 1, generator=generator)).exp()
    x[:, -1] = 0
    return x


def gram(x):
    x = x.flatten(0, -2).double()
    return x.T @ x


def test_sums_of_outer_products_keep_their_expectation():
    x = rows(1.0)
    exact, draws = gram(x), 4000
    samples = torch.stack([gram(TokenSample((2, 40), POSITIONS, 0.2, 0, seed).take(x)) for seed in range(draws)])
    # Four standard errors of each number; the mean alone would not show that the samples differ.
    error = samples.std(0) / draws**0.5
    assert bool(((samples.mean(0) - exact).abs() < 4 * error).all())
    assert bool((error < 0.01 * exact.trace()).all())
    assert bool((samples.std(0) > 0).all())


def test_a_sample_has_its_share_of_each_sequence():
    x = rows(1.0)
    x[1] *= 1000
    taken = TokenSample((2, 40), POSITIONS, 0.26, 0, 0).take(x)
    assert taken.shape == (22, 6)
    assert taken.dtype == torch.float32
    large = taken.norm(dim=1) > 50
    assert large.tolist() == [False] * 11 + [True] * 11


def test_large_rows_are_taken_as_they_are():
    x = rows(0.1)
    x[:, 7] *= 1e3
    for seed in range(20):
        taken = TokenSample((2, 40), POSITIONS, 0.1, 0, seed).take(x)
        assert torch.equal(taken[[0, 4]], x[:, 7])


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_what_does_not_count_is_never_taken(share):
    # Ten tokens of each sequence count, fewer than are asked for, so that all are taken as they are.
    x = rows(1.0)
    x[:, 10:] = 1e6
    counted = torch.cat([torch.arange(10), torch.arange(40, 50)])
    taken = TokenSample((2, 40), counted, share, 0, 1).take(x)
    torch.testing.assert_close(gram(taken), gram(x[:, :10]))


def test_rows_of_zeros_stand_for_nothing():
    assert not TokenSample((2, 40), POSITIONS, 0.3, 0, 0).take(torch.zeros(2, 40, 3)).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(value):
    x = rows(1.0)
    x[1, 5, 2] = value
    assert not TokenSample((2, 40), POSITIONS, 0.1, 0, 0).take(x).isfinite().all()


def test_sequences_have_numbers_of_their_own():
    both = draws_of((2, 5), 3, 2, 0)
    assert torch.equal(both, torch.cat([draws_of((1, 5), 3, 2, 0), draws_of((1, 5), 4, 2, 0)]))
    assert not torch.equal(both[:5], both[5:])
    assert not torch.equal(both, draws_of((2, 5), 3, 2, 1))


@pytest.fixture(params=BUILDERS)
def factors(request):
    """Gradient factors of a model of each family by an ``Estimation``."""
    model = build(request.param)
    anatomy = examine(model, family_of(model.config.model_type))
    text = CalibrationTokens(tokens(4, 12), None, {})

    def estimated(how):
        curvature = estimate(Session(model, anatomy, text), anatomy.dense_masks(), how)
        return {name: curvature.gradient_factor(layer) for name, layer in anatomy.layers.items()}

    return estimated


def test_a_factor_does_not_depend_on_the_batches(factors):
    how = Estimation(1, "float32", gradient_share=0.3)
    one, other = factors(how), factors(replace(how, batch_size=3))
    for name, factor in one.items():
        torch.testing.assert_close(other[name], factor, rtol=1e-4, atol=1e-5 * float(factor.diagonal().max()))


def test_the_mean_of_factors_by_samples_is_that_of_all_tokens(factors):
    exact, how = factors(Estimation(4, "float32")), Estimation(4, "float32", gradient_share=0.5)
    sampled = [factors(replace(how, seed=seed)) for seed in range(60)]
    for name, factor in exact.items():
        draws = torch.stack([each[name] for each in sampled])
        errors = draws - factor
        alone, mean = errors.flatten(1).norm(dim=1).square().mean().sqrt(), errors.mean(0).norm()
        # About 1 / sqrt(60) of it, and what float32 loses beside one very large gradient.
        assert 0 < mean < 0.3 * alone + 1e-5 * factor.norm()
