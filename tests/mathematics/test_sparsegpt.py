"""SparseGPT against a slow version with explicit inverses, and against exact least squares."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from llm_surgeon.errors import NotPositiveDefiniteError
from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.mathematics.sparsegpt import inverse_factor, solve


def problem(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, oracles.random_factor(columns, generator)


def slow_sparsegpt(weight, a, sparsity, pattern, block):
    """Optimal brain surgeon on the columns not yet passed, with a fresh inverse at each of them."""
    weight, (rows, columns) = weight.clone(), weight.shape
    keep = torch.ones_like(weight, dtype=torch.bool)

    def costs(start, end):
        # What decides on column c is the inverse over the columns from c on.
        remaining = torch.stack([torch.linalg.inv(a[c:, c:])[0, 0] for c in range(start, end)])
        return weight[:, start:end] ** 2 / remaining

    for c in range(columns):
        if pattern is None and c % block == 0:
            end = min(c + block, columns)
            count = round(sparsity * rows * end) - round(sparsity * rows * c)
            cost = costs(c, end)
            lowest = cost.flatten().argsort()[:count]
            chosen = torch.zeros(cost.numel(), dtype=torch.bool)
            chosen[lowest] = True
            keep[:, c:end] = ~chosen.view(cost.shape)
        if pattern is not None and c % pattern.group == 0:
            for r, cost in enumerate(costs(c, c + pattern.group)):
                keep[r, c + cost.argsort()[: pattern.removed]] = False
        inverse = torch.linalg.inv(a[c:, c:])
        for r in range(rows):
            if not keep[r, c]:
                weight[r, c:] -= weight[r, c] / inverse[0, 0] * inverse[0]
    return weight * keep, keep


def output_error(before, after, a):
    change = after - before
    return float((change @ a * change).sum())


def least_squares(weight, a, keep):
    """The exact minimiser of each row's output error with the removed weights at zero."""
    exact = torch.stack(
        [row + oracles.constrained_minimum(a, row, ~kept)[1] for row, kept in zip(weight, keep, strict=True)]
    )
    return exact * keep


@pytest.mark.parametrize("columns", [1, 6, 13])
def test_the_factor_is_that_of_the_inverse(columns):
    _, a = problem(2, columns)
    factor = inverse_factor(a, 0.1, "test")
    assert torch.equal(factor, factor.triu())
    damped = a + 0.1 * torch.eye(columns, dtype=torch.float64)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-9, atol=1e-9)


def test_a_matrix_without_decomposition_is_named():
    with pytest.raises(NotPositiveDefiniteError, match=r"down_proj"):
        inverse_factor(-torch.eye(4, dtype=torch.float64), 1e-6, "down_proj")


@pytest.mark.parametrize("pattern", [None, "2:4", "1:4", "3:4"])
@pytest.mark.parametrize("block", [1, 4, 5, 12, 100])
def test_it_is_the_slow_version(pattern, block):
    weight, a = problem(6, 12)
    parsed = Pattern.parse(pattern)
    sparsity = parsed.sparsity if parsed else 0.5
    solution = solve(weight, inverse_factor(a, 0.0, "test"), sparsity, parsed, block)
    expected, keep = slow_sparsegpt(weight, a, sparsity, parsed, block)
    assert torch.equal(solution.keep, keep)
    torch.testing.assert_close(solution.weight, expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 17),
    st.floats(0.0, 1.0),
    st.integers(1, 20),
    st.integers(0, 1000),
)
def test_counts_are_exact_and_the_error_is_never_below_the_optimum(rows, columns, sparsity, block, seed):
    weight, a = problem(rows, columns, seed)
    solution = solve(weight, inverse_factor(a, 0.0, "test"), sparsity, None, block)
    assert int((~solution.keep).sum()) == round(sparsity * rows * columns)
    assert solution.weight[~solution.keep].eq(0).all()
    optimum = output_error(weight, least_squares(weight, a, solution.keep), a)
    assert output_error(weight, solution.weight, a) >= optimum - 1e-9


def test_it_is_optimal_where_all_that_goes_is_left_of_all_that_stays():
    weight, a = problem(5, 10)
    weight[:, :4] *= 1e-3
    solution = solve(weight, inverse_factor(a, 0.0, "test"), 0.4, None, 10)
    assert solution.keep.sum(0).tolist() == [0] * 4 + [5] * 6
    torch.testing.assert_close(solution.weight, least_squares(weight, a, solution.keep), rtol=1e-8, atol=1e-10)


def test_it_is_optimal_for_inputs_without_correlations_which_change_nothing():
    weight, _ = problem(5, 10)
    a = torch.rand(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).add(0.1).diag()
    solution = solve(weight, inverse_factor(a, 0.0, "test"), 0.5, None, 10)
    torch.testing.assert_close(solution.weight, weight * solution.keep, rtol=0, atol=1e-12)
    by_cost = (weight**2 * a.diagonal()).flatten().argsort()
    assert set((~solution.keep).flatten().nonzero().flatten().tolist()) == set(by_cost[:25].tolist())


def test_it_is_worse_than_optimal_where_what_goes_is_in_between():
    weight, a = problem(8, 16)
    solution = solve(weight, inverse_factor(a, 0.0, "test"), 0.5, None, 4)
    exact = output_error(weight, least_squares(weight, a, solution.keep), a)
    masked = output_error(weight, weight * solution.keep, a)
    assert exact * 1.001 < output_error(weight, solution.weight, a) < masked


def test_groups_are_kept_whole_by_a_block_that_cuts_them():
    weight, a = problem(6, 24)
    solution = solve(weight, inverse_factor(a, 0.0, "test"), 0.5, Pattern(2, 4), 6)
    assert (solution.keep.view(6, 6, 4).sum(-1) == 2).all()


def test_dead_inputs_go_first_and_cost_nothing():
    weight, a = problem(4, 8)
    a[3], a[:, 3] = 0.0, 0.0
    solution = solve(weight, inverse_factor(a, 1e-6, "test"), 1 / 8, None, 8)
    assert not solution.keep[:, 3].any()
    assert output_error(weight, solution.weight, a) == pytest.approx(0, abs=1e-9)
