"""Costs and updates of every structure against dense constrained least squares in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_surgeon.errors import NotPositiveDefiniteError
from llm_surgeon.mathematics.fisher import Damping, Diagonal, KroneckerProduct, Solver, Split, SumOfTwo
from llm_surgeon.mathematics.updates import remove_elements
from oracles import constrained_minimum, fisher, random_factor

DAMPING = Damping(a=0.05, g=0.2)
EXACT = Solver(steps=500, tolerance=1e-14)


def damped(matrix, fraction):
    return matrix + fraction * (float(matrix.diagonal().mean()) or 1.0) * torch.eye(len(matrix), dtype=matrix.dtype)


class Problem:
    """Random weights and factors, some rows and columns dead, some weights gone before and some going now."""

    def __init__(self, rows, columns, seed, *, a=True, g=True):
        generator = torch.Generator().manual_seed(seed)

        def bernoulli(probability):
            return torch.rand(rows, columns, generator=generator) < probability

        self.weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64).round(decimals=1)
        self.a = random_factor(columns, generator) if a else None
        self.g = random_factor(rows, generator) if g else None
        if seed % 3 == 0 and a:  # an input that is never active
            self.a[0], self.a[:, 0] = 0.0, 0.0
        if seed % 3 == 1 and g:  # an output without a gradient
            self.g[-1], self.g[:, -1] = 0.0, 0.0
        before, now = bernoulli(0.3), bernoulli(0.4)
        self.kept = ~(before | now)
        self.weight[before] = 0.0
        dense_a = damped(self.a, DAMPING.a) if a else torch.eye(columns, dtype=torch.float64)
        dense_g = damped(self.g, DAMPING.g) if g else torch.eye(rows, dtype=torch.float64)
        self.hessian = fisher(dense_a, dense_g)
        self.product = KroneckerProduct(self.g, self.a, DAMPING, "layer")

    def minimum(self, removed):
        """Minimum, and the weights at it, for a set of removed weights ``[R, C]``."""
        value, change = constrained_minimum(self.hessian, self.weight.flatten(), removed.flatten())
        return value, self.weight + change.view_as(self.weight)


shapes = st.fixed_dictionaries({"rows": st.integers(1, 6), "columns": st.integers(1, 7), "seed": st.integers(0, 999)})
factors = st.fixed_dictionaries({"a": st.booleans(), "g": st.booleans()})


@settings(deadline=None, max_examples=60)
@given(shapes, factors)
def test_all_weights_together_is_the_exact_minimiser(shape, given_factors):
    problem = Problem(**shape, **given_factors)
    found = problem.product.remove_elements(problem.weight, problem.kept, EXACT)
    _, expected = problem.minimum(~problem.kept)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert not found[~problem.kept].any()


@settings(deadline=None, max_examples=30)
@given(shapes, st.integers(1, 5))
def test_groups_in_sequence_with_constraints_are_the_joint_solution_whatever_their_size(shape, size):
    """The reason why group sizes mean independence here: nested projections compose."""
    problem = Problem(**shape)
    theta, removed = problem.weight.flatten(), (~problem.kept).flatten()
    _, joint = constrained_minimum(problem.hessian, theta, removed)
    positions, gone = removed.nonzero().flatten(), torch.zeros_like(removed)
    current = theta.clone()
    for start in range(0, len(positions), size):
        gone[positions[start : start + size]] = True
        current = current + constrained_minimum(problem.hessian, current, gone)[1]
    torch.testing.assert_close(current, theta + joint, rtol=1e-8, atol=1e-8)


def in_groups(removed, size):
    """Row-major positions of removed weights in groups: whole rows while they fit, longer rows cut."""
    groups, group = [], []
    for r, row in enumerate(removed):
        places = [(r, int(c)) for c in row.nonzero().flatten()]
        if group and len(group) + len(places) > size:
            groups.append(group)
            group = []
        group += places
        while len(group) > size:
            groups.append(group[:size])
            group = group[size:]
    return [g for g in [*groups, group] if g]


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(1, 12), factors)
def test_independent_groups_of_weights_are_the_sum_of_what_each_would_do_alone(shape, size, given_factors):
    problem = Problem(**shape, **given_factors)
    expected = problem.weight.clone()
    for group in in_groups(~problem.kept, size):
        mask = torch.zeros_like(problem.kept)
        for r, c in group:
            mask[r, c] = True
        expected += problem.minimum(mask)[1] - problem.weight
    expected[~problem.kept] = 0.0
    found = problem.product.remove_elements(problem.weight, problem.kept, Solver(max_correlations=size))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=40)
@given(shapes)
def test_one_group_of_everything_is_the_joint_solution(shape):
    problem = Problem(**shape)
    grouped = problem.product.remove_elements(problem.weight, problem.kept, Solver(max_correlations=10_000))
    torch.testing.assert_close(
        grouped, problem.product.remove_elements(problem.weight, problem.kept, EXACT), rtol=1e-8, atol=1e-8
    )


def split(size, removed):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[removed] = True
    return Split((~mask).nonzero().flatten(), mask.nonzero().flatten())


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(0, 4), factors)
def test_rows_and_columns_together_and_in_independent_groups(shape, size, given_factors):
    problem = Problem(**shape, **given_factors)
    generator = torch.Generator().manual_seed(shape["seed"])
    r = torch.randperm(shape["rows"], generator=generator)[: shape["rows"] // 2].sort().values
    c = torch.randperm(shape["columns"], generator=generator)[: shape["columns"] // 2].sort().values
    rows, columns = split(shape["rows"], r), split(shape["columns"], c)

    def removing(some_rows, some_columns):
        mask = torch.zeros_like(problem.kept)
        mask[some_rows] = True
        mask[:, some_columns] = True
        return problem.minimum(mask)[1]

    if size == 0:
        expected = removing(r, c)
    else:
        expected = problem.weight.clone()
        for group in r.split(size) if len(r) else ():
            expected += removing(group, []) - problem.weight
        for group in c.split(size) if len(c) else ():
            expected += removing([], group) - problem.weight
    found = problem.product.remove_rows_and_columns(problem.weight, rows, columns, Solver(max_correlations=size))
    torch.testing.assert_close(found, expected[rows.kept][:, columns.kept], rtol=1e-8, atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(shapes, factors)
def test_correlated_costs_are_minima_and_independent_costs_are_diagonal_blocks(shape, given_factors):
    """Without damping, where numerators and inverses are of the same factors."""
    shape = shape | {"seed": shape["seed"] * 3 + 2}  # no dead row or column: they are singular without damping
    problem = Problem(**shape, **given_factors)
    a = problem.a if problem.a is not None else torch.eye(shape["columns"], dtype=torch.float64)
    g = problem.g if problem.g is not None else torch.eye(shape["rows"], dtype=torch.float64)
    product = KroneckerProduct(problem.g, problem.a, Damping(a=0.0, g=0.0), "layer")
    problem.hessian = fisher(a, g)
    weight, everything = problem.weight, torch.zeros_like(problem.kept)
    # With all other inputs (outputs) independent, one factor's off-diagonals are gone.
    for correlated, rows_hessian, columns_hessian, elements_hessian in (
        (True, problem.hessian, problem.hessian, problem.hessian),
        (False, fisher(a, g.diagonal().diag()), fisher(a.diagonal().diag(), g), problem.hessian.diagonal().diag()),
    ):
        found = (
            product.row_costs(weight, correlated=correlated),
            product.column_costs(weight, correlated=correlated),
            product.element_costs(weight, correlated=correlated),
        )
        for r in range(shape["rows"]):
            mask = everything.clone()
            mask[r] = True
            problem.hessian = rows_hessian
            assert float(found[0][r]) == pytest.approx(problem.minimum(mask)[0], rel=1e-8, abs=1e-8)
            for c in range(shape["columns"]):
                mask = everything.clone()
                mask[r, c] = True
                problem.hessian = elements_hessian
                assert float(found[2][r, c]) == pytest.approx(problem.minimum(mask)[0], rel=1e-8, abs=1e-8)
        for c in range(shape["columns"]):
            mask = everything.clone()
            mask[:, c] = True
            problem.hessian = columns_hessian
            assert float(found[1][c]) == pytest.approx(problem.minimum(mask)[0], rel=1e-8, abs=1e-8)


def test_the_predicted_loss_falls_with_every_step():
    problem = Problem(6, 7, 5)
    losses = []
    for steps in range(8):
        change = problem.product.remove_elements(problem.weight, problem.kept, Solver(steps=steps, tolerance=0.0))
        change = (change - problem.weight).flatten()
        losses.append(float(0.5 * change @ problem.hessian @ change))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert problem.minimum(~problem.kept)[0] < losses[-1]


def test_nothing_removed_changes_nothing():
    problem = Problem(4, 5, 2)
    everything = torch.ones_like(problem.kept)
    for solver in (EXACT, Solver(max_correlations=3)):
        torch.testing.assert_close(problem.product.remove_elements(problem.weight, everything, solver), problem.weight)


def test_everything_removed_leaves_zeros():
    problem = Problem(3, 4, 2)
    nothing = torch.zeros_like(problem.kept)
    for solver in (EXACT, Solver(max_correlations=3)):
        assert not problem.product.remove_elements(problem.weight, nothing, solver).any()


def test_correlations_that_are_not_definite_are_an_error():
    weight, kept = torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)
    from llm_surgeon.mathematics.updates import remove_elements_independently

    with pytest.raises(NotPositiveDefiniteError, match="fc1"):
        remove_elements_independently(weight, kept, -torch.eye(2), torch.eye(2), 2, "fc1")


def test_the_diagonal_knows_independent_costs_only_and_updates_nothing():
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    diagonal = Diagonal(torch.tensor([[2.0, 1.0], [0.0, 4.0]]))
    expected = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(diagonal.element_costs(weight, correlated=False), expected)
    torch.testing.assert_close(diagonal.row_costs(weight, correlated=False), expected.sum(1))
    torch.testing.assert_close(diagonal.column_costs(weight, correlated=False), expected.sum(0))
    kept = torch.tensor([[True, False], [True, True]])
    torch.testing.assert_close(diagonal.remove_elements(weight, kept, EXACT), weight * kept)


def test_steps_are_made_on_an_exact_problem_until_the_tolerance():
    """A diagonal Fisher is solved by the first step, so that more would divide by nothing."""
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    kept = weight > 0
    diagonal = torch.full_like(weight, 2.0)
    found = remove_elements(weight, kept, lambda x: diagonal * x, diagonal, steps=10, tolerance=0.0)
    torch.testing.assert_close(found, weight * kept)


@settings(deadline=None, max_examples=30)
@given(shapes)
def test_weights_of_a_sum_of_two_products_together_are_the_exact_minimiser(shape):
    problem = Problem(**(shape | {"seed": 3 * shape["seed"] + 2}))
    generator = torch.Generator().manual_seed(shape["seed"])
    second = tuple(0.2 * random_factor(size, generator) for size in (shape["rows"], shape["columns"]))
    two = SumOfTwo((problem.g, problem.a), second, DAMPING, "layer")
    problem.hessian = problem.hessian + fisher(second[1], second[0])
    _, expected = problem.minimum(~problem.kept)
    found = two.remove_elements(problem.weight, problem.kept, EXACT)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_independent_costs_of_an_indefinite_sum_are_not_negative():
    eye = torch.eye(3, dtype=torch.float64)
    two = SumOfTwo((eye, eye), (torch.diag(torch.tensor([-2.0, 0.0, 1.0], dtype=torch.float64)), eye), DAMPING, "layer")
    weight = torch.ones(3, 3, dtype=torch.float64)
    costs = two.row_costs(weight, correlated=False)
    torch.testing.assert_close(costs, torch.tensor([0.0, 1.5, 3.0], dtype=torch.float64))
    assert (two.element_costs(weight, correlated=False) >= 0).all()
    assert (two.column_costs(weight, correlated=False) >= 0).all()
