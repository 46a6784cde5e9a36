"""The power iteration against the singular value decomposition of the rearranged dense Fisher, float64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_surgeon.mathematics.nearest_kronecker import (
    GRAM_ELEMENTS,
    balanced_pair,
    finished_half_step,
    fisher_rmse,
    gradient_half_step,
    input_half_step,
    nearest_kronecker_sum,
)
from oracles import random_factor

# Enough for a ratio of singular values of 0.99.
MANY = 1000


def samples(rows, columns, positions, seed):
    """Inputs and gradients that depend on one another: both share factors of scale."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(positions, columns, generator=generator, dtype=torch.float64)
    g = torch.randn(positions, rows, generator=generator, dtype=torch.float64)
    g[:, 0] += a[:, 0]
    return a * (1 + a[:, :1].abs()), g


def dense_fisher(a, g):
    return torch.stack([torch.kron(torch.outer(y, y), torch.outer(x, x)) for x, y in zip(a, g, strict=True)]).mean(0)


def rearranged(fisher, rows, columns):
    """R(F): row (r, r'), column (c, c') holds the element of F at (rc, r'c')."""
    return fisher.view(rows, columns, rows, columns).permute(0, 2, 1, 3).reshape(rows**2, columns**2)


def dense_sum(terms):
    return sum(torch.kron(gradient, inputs) for gradient, inputs in terms)


def best(fisher, rows, columns, terms):
    """The nearest sum, by singular value decomposition, rearranged, and all singular values."""
    u, s, v = torch.linalg.svd(rearranged(fisher, rows, columns))
    return (u[:, :terms] * s[:terms]) @ v[:terms], s


def dense_rmse(fisher, terms):
    return math.sqrt(float((fisher - dense_sum(terms)).square().mean()))


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize(("rows", "columns", "seed"), [(3, 4, 0), (4, 3, 1), (5, 2, 2), (2, 6, 3)])
def test_terms_equal_those_of_the_singular_value_decomposition(rows, columns, seed, terms):
    a, g = samples(rows, columns, 12, seed)
    fisher = dense_fisher(a, g)
    expected, values = best(fisher, rows, columns, terms)
    assert float(values[terms] / values[terms - 1]) < 0.97, "the oracle has to be well defined"
    found = nearest_kronecker_sum(a, g, terms, MANY)
    scale = float(fisher.abs().max())
    torch.testing.assert_close(rearranged(dense_sum(found), rows, columns), expected, rtol=1e-6, atol=1e-6 * scale)
    for (gradient, inputs), value in zip(found, values, strict=False):
        assert float(gradient.norm()) == pytest.approx(math.sqrt(float(value)), rel=1e-6)
        assert float(inputs.norm()) == pytest.approx(math.sqrt(float(value)), rel=1e-6)


@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), positions=st.integers(1, 20), seed=st.integers(0, 1000))
def test_the_first_term_is_the_nearest_and_positive_semi_definite(rows, columns, positions, seed):
    a, g = samples(rows, columns, positions, seed)
    fisher = dense_fisher(a, g)
    [(gradient, inputs)] = nearest_kronecker_sum(a, g, 1, MANY)
    for factor in (gradient, inputs):
        assert torch.equal(factor, factor.T)
        assert float(torch.linalg.eigvalsh(factor).min()) >= -1e-12 * float(factor.norm())
    _, values = best(fisher, rows, columns, 1)
    left = math.sqrt(float(values[1:].square().sum())) / (rows * columns)
    assert dense_rmse(fisher, [(gradient, inputs)]) == pytest.approx(left, rel=1e-6, abs=1e-9 * float(values[0]))


@settings(deadline=None, max_examples=15)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 1000))
def test_a_kronecker_product_is_recovered_at_once(rows, columns, seed):
    """Every input with every gradient: truly independent, so that the Fisher is a product; nothing is left for more."""
    a, g = samples(rows, columns, 6, seed)
    every_a, every_g = a.repeat_interleave(6, 0), g.repeat(6, 1)
    first, rest = nearest_kronecker_sum(every_a, every_g, 2, 1)
    expected = torch.kron(g.T @ g / 6, a.T @ a / 6)
    scale = float(expected.abs().max())
    torch.testing.assert_close(torch.kron(*first), expected, rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(torch.kron(*rest), torch.zeros_like(expected), rtol=0, atol=1e-12 * scale)


@settings(deadline=None, max_examples=25)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    positions=st.integers(1, 20),
    terms=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_rmse_equals_the_dense_one(rows, columns, positions, terms, seed):
    a, g = samples(rows, columns, positions, seed)
    generator = torch.Generator().manual_seed(seed)
    pairs = [(random_factor(rows, generator), -random_factor(columns, generator)) for _ in range(terms)]
    assert fisher_rmse(a, g, pairs) == pytest.approx(dense_rmse(dense_fisher(a, g), pairs), rel=1e-8)


def test_rmse_of_an_exact_sum_is_rounding():
    a, g = samples(3, 4, 1, 0)
    exact = [(torch.outer(g[0], g[0]), torch.outer(a[0], a[0]))]
    assert fisher_rmse(a, g, exact) <= 1e-7 * fisher_rmse(a, g, [])


def test_rmse_does_not_depend_on_the_size_of_its_blocks(monkeypatch):
    a, g = samples(3, 4, 11, 0)
    whole = fisher_rmse(a, g, [])
    assert GRAM_ELEMENTS > 11 * 11
    monkeypatch.setattr("llm_surgeon.mathematics.nearest_kronecker.GRAM_ELEMENTS", 3 * 11)
    assert fisher_rmse(a, g, []) == pytest.approx(whole, rel=1e-12)


def test_rmse_falls_with_the_number_of_terms_and_beats_independence():
    """Figure 5 of the paper: nearest products against K-FAC's, which takes inputs and gradients for independent."""
    a, g = samples(4, 5, 40, 0)
    found = nearest_kronecker_sum(a, g, 4, 50)
    errors = [fisher_rmse(a, g, found[:terms]) for terms in range(5)]
    assert all(later < 0.99 * before for before, later in pairwise(errors))
    independent = [(g.T @ g / len(g), a.T @ a / len(a))]
    assert errors[1] < fisher_rmse(a, g, independent) < errors[0]


@pytest.mark.parametrize("scale", [1.0, -1e-3])
def test_a_warm_start_stays_at_the_solution_in_one_iteration(scale):
    """Whatever the scale and the sign of what it starts from; a cold start is not there yet."""
    a, g = samples(4, 3, 15, 0)
    found = nearest_kronecker_sum(a, g, 2, MANY)
    warm = nearest_kronecker_sum(a, g, 2, 1, start=[(gradient, scale * inputs) for gradient, inputs in found])
    for before, after in zip(found, warm, strict=True):
        torch.testing.assert_close(torch.kron(*after), torch.kron(*before), rtol=1e-6, atol=1e-8)
    assert float(warm[0][1].trace()) > 0
    cold = nearest_kronecker_sum(a, g, 2, 1)
    assert (dense_sum(cold) - dense_sum(found)).abs().max() > 1e-2


def test_a_start_of_fewer_terms_serves_the_first_ones():
    a, g = samples(4, 3, 15, 0)
    found = nearest_kronecker_sum(a, g, 2, MANY)
    extended = nearest_kronecker_sum(a, g, 2, 200, start=found[:1])
    torch.testing.assert_close(dense_sum(extended), dense_sum(found), rtol=1e-6, atol=1e-6)


def test_half_steps_are_products_with_the_rearranged_fisher():
    a, g = samples(3, 4, 10, 0)
    matrix = rearranged(dense_fisher(a, g), 3, 4)
    generator = torch.Generator().manual_seed(0)
    inputs, gradient = random_factor(4, generator), random_factor(3, generator)
    torch.testing.assert_close(gradient_half_step(a, g, inputs).flatten() / 10, matrix @ inputs.flatten())
    torch.testing.assert_close(input_half_step(a, g, gradient).flatten() / 10, matrix.T @ gradient.flatten())


def test_half_steps_add_up_over_batches():
    a, g = samples(3, 4, 10, 0)
    generator = torch.Generator().manual_seed(0)
    inputs, gradient = random_factor(4, generator), random_factor(3, generator)
    batches = list(zip(a.split([1, 3, 6]), g.split([1, 3, 6]), strict=True))
    torch.testing.assert_close(
        sum(gradient_half_step(x, y, inputs) for x, y in batches), gradient_half_step(a, g, inputs)
    )
    torch.testing.assert_close(
        sum(input_half_step(x, y, gradient) for x, y in batches), input_half_step(a, g, gradient)
    )


def test_half_steps_sum_in_the_type_of_the_factor():
    """Squares of squares of small gradients are below what float16 can hold."""
    a, g = samples(3, 4, 10, 0)
    low_a, low_g = a.half(), (1e-3 * g).half()
    step = gradient_half_step(low_a, low_g, torch.eye(4, dtype=torch.float64))
    assert step.dtype == torch.float64
    torch.testing.assert_close(step, gradient_half_step(low_a.double(), low_g.double(), torch.eye(4).double()))


def test_a_finished_half_step_has_no_part_of_the_earlier_terms():
    """It is the half step of what deflation leaves of the dense Fisher, with norm 1 and the norm it had."""
    a, g = samples(3, 4, 10, 0)
    generator = torch.Generator().manual_seed(0)
    earlier = [(random_factor(3, generator), random_factor(4, generator)) for _ in range(2)]
    inputs = random_factor(4, generator)
    left = rearranged(dense_fisher(a, g) - dense_sum(earlier), 3, 4)
    expected = (left @ inputs.flatten()).view(3, 3)
    factor, norm = finished_half_step(gradient_half_step(a, g, inputs), 10, inputs, earlier)
    assert norm == pytest.approx(float(expected.norm()), rel=1e-12)
    torch.testing.assert_close(factor, expected / expected.norm(), rtol=1e-10, atol=1e-12)


def test_streamed_half_steps_are_the_driver():
    """The recipe of the module's docstring, second term, batch by batch."""
    a, g = samples(3, 4, 10, 0)
    first = nearest_kronecker_sum(a, g, 1, 5)
    inputs = torch.eye(4, dtype=torch.float64)
    batches = list(zip(a.split(4), g.split(4), strict=True))
    for _ in range(5):
        total = sum(gradient_half_step(x, y, inputs) for x, y in batches)
        gradient, _ = finished_half_step(total, len(a), inputs, first)
        total = sum(input_half_step(x, y, gradient) for x, y in batches)
        inputs, sigma = finished_half_step(total, len(a), gradient, [(first[0][1], first[0][0])])
    expected = nearest_kronecker_sum(a, g, 2, 5)[1]
    for actual, wanted in zip(balanced_pair(gradient, inputs, sigma), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-8, atol=1e-10)


def test_nothing_left_gives_zeros_and_no_division_by_zero():
    a, g = torch.ones(3, 2), torch.zeros(3, 4)
    for gradient, inputs in nearest_kronecker_sum(a, g, 2, 2):
        assert torch.equal(gradient, torch.zeros(4, 4))
        assert torch.equal(inputs, torch.zeros(2, 2))


def test_small_gradients_in_float32_do_not_underflow():
    """Gradients of 1e-11 make half steps of 1e-22, whose squares float32 does not have."""
    a, g = samples(3, 4, 10, 0)
    expected = dense_sum(nearest_kronecker_sum(a, g, 2, 50))
    actual = dense_sum(nearest_kronecker_sum(a.float(), (1e-11 * g).float(), 2, 50)).double() * 1e22
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_identical_terms_for_a_rotation_of_the_inputs():
    """The start is invariant, so the result after any number of iterations turns with the inputs."""
    a, g = samples(3, 4, 10, 0)
    rotation, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    [(gradient, inputs)] = nearest_kronecker_sum(a, g, 1, 1)
    [(turned_gradient, turned_inputs)] = nearest_kronecker_sum(a @ rotation, g, 1, 1)
    torch.testing.assert_close(turned_gradient, gradient)
    torch.testing.assert_close(turned_inputs, rotation.T @ inputs @ rotation)
