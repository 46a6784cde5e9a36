"""Costs and updates of a sum of two Kronecker products against dense constrained least squares, float64."""

import logging
from dataclasses import dataclass, fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llm_surgeon.errors import NonFiniteError, NotPositiveDefiniteError
from llm_surgeon.mathematics import costs, updates
from llm_surgeon.mathematics.kronecker_sum import KroneckerSum, kronecker_sum, kronecker_sum_bytes
from llm_surgeon.mathematics.linalg import ESCALATION, MAX_ESCALATIONS
from oracles import constrained_minimum, random_factor, removed_mask

DAMPING_G, DAMPING_A = 0.3, 0.07
NOTHING = torch.tensor([], dtype=torch.long)


@dataclass
class Problem:
    weight: Tensor
    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]

    @property
    def operator(self) -> KroneckerSum:
        return kronecker_sum(self.first, self.second, DAMPING_G, DAMPING_A, "block 3")

    @property
    def damped_first(self) -> tuple[Tensor, Tensor]:
        return damped(self.first[0], DAMPING_G), damped(self.first[1], DAMPING_A)

    @property
    def dense(self) -> Tensor:
        """The damped Fisher, ``[RC, RC]``."""
        return torch.kron(*self.damped_first) + torch.kron(*self.second)

    @property
    def undamped(self) -> Tensor:
        return torch.kron(*self.first) + torch.kron(*self.second)

    def minimum(self, mask: Tensor) -> tuple[float, Tensor]:
        value, change = constrained_minimum(self.dense, self.weight.flatten(), mask.flatten())
        return value, change.view_as(self.weight)


def damped(matrix, damping):
    return matrix + damping * torch.eye(len(matrix), dtype=matrix.dtype)


def symmetric(size, generator):
    x = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return x + x.T


def problem_of(rows, columns, seed, strength=0.9):
    """A problem whose indefinite second term takes away up to ``strength`` of the first."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    first = random_factor(rows, generator), random_factor(columns, generator)
    second = symmetric(rows, generator), symmetric(columns, generator)
    problem = Problem(weight, first, second)
    lower = torch.linalg.cholesky(torch.kron(*problem.damped_first))
    relative = torch.linalg.solve(lower, torch.linalg.solve(lower, torch.kron(*second)).T)
    scale = strength / float(torch.linalg.eigvalsh(relative).abs().max())
    return Problem(weight, first, (scale * second[0], second[1]))


def roles(size, generator):
    """A random split of positions into removed, kept and dead by implication, each possibly empty, in any order."""
    order, role = torch.randperm(size, generator=generator), torch.randint(0, 3, (size,), generator=generator)
    return order[role[order] == 0], order[role[order] == 1]


def one(size, index):
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(index), True)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


shapes = {"rows": st.integers(1, 6), "columns": st.integers(1, 6), "seed": st.integers(0, 10_000)}


@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_costs_equal_constrained_least_squares(rows, columns, seed):
    problem = problem_of(rows, columns, seed)
    operator, weight = problem.operator, problem.weight
    elements = [problem.minimum(one(rows * columns, k))[0] for k in range(rows * columns)]
    close(operator.element_costs(weight), torch.tensor(elements, dtype=torch.float64).view(rows, columns))
    by_row = [problem.minimum(one(rows, r)[:, None].expand(rows, columns))[0] for r in range(rows)]
    close(operator.row_costs(weight), torch.tensor(by_row, dtype=torch.float64))
    by_column = [problem.minimum(one(columns, c).expand(rows, columns))[0] for c in range(columns)]
    close(operator.column_costs(weight), torch.tensor(by_column, dtype=torch.float64))


@settings(deadline=None, max_examples=25)
@given(**shapes)
def test_independent_costs_are_the_undamped_quadratic_of_zeroing_alone(rows, columns, seed):
    problem = problem_of(rows, columns, seed)
    operator, weight, dense = problem.operator, problem.weight, problem.undamped

    def alone(mask):
        change = (weight * mask).flatten()
        return 0.5 * change @ dense @ change

    elements = torch.stack([alone(one(rows * columns, k).view(rows, columns)) for k in range(rows * columns)])
    close(operator.independent_element_costs(weight), elements.view(rows, columns))
    close(operator.independent_row_costs(weight), torch.stack([alone(one(rows, r)[:, None]) for r in range(rows)]))
    close(operator.independent_column_costs(weight), torch.stack([alone(one(columns, c)) for c in range(columns)]))


@settings(deadline=None, max_examples=25)
@given(**shapes)
def test_application_and_diagonal_are_those_of_the_dense_damped_fisher(rows, columns, seed):
    problem = problem_of(rows, columns, seed)
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    close(problem.operator.apply(x), (problem.dense @ x.flatten()).view(rows, columns))
    close(problem.operator.diagonal(), problem.dense.diagonal().view(rows, columns))


@settings(deadline=None, max_examples=60)
@given(**shapes)
def test_rows_and_columns_together_are_the_exact_joint_minimiser(rows, columns, seed):
    """In the problem of what is alive: structures that died by implication take no part."""
    problem = problem_of(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    (rows_removed, rows_kept), (columns_removed, columns_kept) = roles(rows, generator), roles(columns, generator)
    updated = problem.operator.remove_structures(problem.weight, rows_removed, rows_kept, columns_removed, columns_kept)

    alive = torch.zeros(rows, columns, dtype=torch.bool)
    alive[torch.cat([rows_removed, rows_kept])[:, None], torch.cat([columns_removed, columns_kept])] = True
    index = alive.flatten().nonzero().flatten()
    removed = removed_mask(rows, columns, rows_removed, columns_removed)[index]
    theta = problem.weight.flatten()
    _, change = constrained_minimum(problem.dense[index][:, index], theta[index], removed)
    whole = theta.index_add(0, index, change).view(rows, columns)
    close(updated, whole[rows_kept][:, columns_kept])


@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_rows_alone_and_columns_alone_are_exact(rows, columns, seed):
    problem = problem_of(rows, columns, seed)
    removed, kept = roles(rows, torch.Generator().manual_seed(seed))
    every_row, every_column = torch.arange(rows), torch.arange(columns)
    by_rows = problem.operator.remove_rows(problem.weight, removed, kept)
    alive = torch.cat([removed, kept])
    index = (alive[:, None] * columns + every_column).flatten()
    mask = (torch.arange(len(alive)) < len(removed)).repeat_interleave(columns)
    theta = problem.weight.flatten()[index]
    _, change = constrained_minimum(problem.dense[index][:, index], theta, mask)
    close(by_rows, (theta + change).view(-1, columns)[len(removed) :])

    removed, kept = roles(columns, torch.Generator().manual_seed(seed))
    by_columns = problem.operator.remove_columns(problem.weight, removed, kept)
    alive = torch.cat([removed, kept])
    index = (every_row[:, None] * columns + alive).flatten()
    mask = (torch.arange(len(alive)) < len(removed)).repeat(rows)
    theta = problem.weight.flatten()[index]
    _, change = constrained_minimum(problem.dense[index][:, index], theta, mask)
    close(by_columns, (theta + change).view(rows, -1)[:, len(removed) :])


def test_the_column_step_must_be_restricted_to_the_kept_rows():
    """One step after the other on the whole operator, right for a single product, is not the joint minimiser."""
    problem = problem_of(5, 6, 1)
    gone, rows, columns = torch.tensor([0, 1]), torch.arange(2, 5), torch.arange(2, 6)
    joint = problem.operator.remove_structures(problem.weight, gone, rows, gone, columns)
    after_rows = torch.zeros_like(problem.weight).index_copy(
        0, rows, problem.operator.remove_rows(problem.weight, gone, rows)
    )
    naive = problem.operator.remove_columns(after_rows, gone, columns)[rows]
    assert (joint - naive).abs().max() > 1e-3


@settings(deadline=None, max_examples=25)
@given(**shapes)
def test_the_cost_of_a_removed_set_is_the_quadratic_of_its_update(rows, columns, seed):
    problem = problem_of(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    rows_gone = torch.rand(rows, generator=generator) < 0.5
    columns_gone = torch.rand(columns, generator=generator) < 0.5
    split = [part.nonzero().flatten() for part in (rows_gone, ~rows_gone, columns_gone, ~columns_gone)]
    whole = torch.zeros_like(problem.weight)
    whole[split[1][:, None], split[3]] = problem.operator.remove_structures(problem.weight, *split)
    change = whole - problem.weight
    minimum, _ = problem.minimum(rows_gone[:, None] | columns_gone)
    assert float(0.5 * (change * problem.operator.apply(change)).sum()) == pytest.approx(minimum, rel=1e-8, abs=1e-10)


@settings(deadline=None, max_examples=20)
@given(**shapes, side=st.integers(0, 1))
def test_without_a_second_term_it_is_kfac(rows, columns, seed, side):
    """With damped numerators, which K-FAC's costs do not have; the second term is zero if either factor is."""
    problem = problem_of(rows, columns, seed)
    second = list(problem.second)
    second[side] = torch.zeros_like(second[side])
    operator = kronecker_sum(problem.first, tuple(second), DAMPING_G, DAMPING_A, "block 3")
    weight, (g, a) = problem.weight, problem.damped_first
    g_inverse, a_inverse = torch.linalg.inv(g).diagonal(), torch.linalg.inv(a).diagonal()
    close(operator.element_costs(weight), 0.5 * weight**2 / torch.outer(g_inverse, a_inverse))
    close(operator.row_costs(weight), costs.row_costs(weight, a, g_inverse))
    close(operator.column_costs(weight), costs.column_costs(weight, g, a_inverse))

    generator = torch.Generator().manual_seed(seed)
    (rows_removed, rows_kept), (columns_removed, columns_kept) = roles(rows, generator), roles(columns, generator)
    expected = updates.remove_rows(weight, problem.first[0], rows_removed, rows_kept, DAMPING_G, "g")
    expected = updates.remove_columns(expected, problem.first[1], columns_removed, columns_kept, DAMPING_A, "a")
    close(operator.remove_structures(weight, rows_removed, rows_kept, columns_removed, columns_kept), expected)


def test_what_is_dead_costs_nothing_and_changes_nothing():
    """A row and a column of zeros, in the weight and in every factor, beside the problem without them."""
    problem = problem_of(4, 3, 5)

    def padded(matrix):
        return torch.nn.functional.pad(matrix, (0, 1, 0, 1))

    wide = Problem(
        padded(problem.weight),
        (padded(problem.first[0]), padded(problem.first[1])),
        (padded(problem.second[0]), padded(problem.second[1])),
    )
    by_row, by_column = wide.operator.row_costs(wide.weight), wide.operator.column_costs(wide.weight)
    assert float(by_row[-1]) == float(by_column[-1]) == 0
    close(by_row[:-1], problem.operator.row_costs(problem.weight))
    close(by_column[:-1], problem.operator.column_costs(problem.weight))
    close(wide.operator.element_costs(wide.weight), padded(problem.operator.element_costs(problem.weight)))

    removed, rows, columns = torch.tensor([0]), torch.tensor([1, 2, 3]), torch.tensor([1, 2])
    expected = problem.operator.remove_structures(problem.weight, removed, rows, removed, columns)
    rows, columns = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3])
    close(wide.operator.remove_structures(wide.weight, removed, rows, removed, columns), padded(expected))


def test_twins_cost_the_same():
    """Two rows that are alike in the weight and in the factors: degenerate spectra do no harm."""
    problem = problem_of(4, 3, 2)
    order = torch.tensor([0, 0, 1, 2])
    twins = Problem(
        problem.weight[order],
        (problem.first[0][order][:, order], torch.eye(3, dtype=torch.float64)),
        (problem.second[0][order][:, order], torch.eye(3, dtype=torch.float64)),
    )
    by_row, elements = twins.operator.row_costs(twins.weight), twins.operator.element_costs(twins.weight)
    close(by_row[0], by_row[1])
    close(elements[0], elements[1])
    expected, _ = twins.minimum(one(4, 0)[:, None].expand(4, 3))
    assert float(by_row[0]) == pytest.approx(expected, rel=1e-8)


def test_nothing_kept_and_nothing_removed():
    problem = problem_of(3, 4, 0)
    operator, weight, rows, columns = problem.operator, problem.weight, torch.arange(3), torch.arange(4)
    assert operator.remove_structures(weight, rows, NOTHING, NOTHING, columns).shape == (0, 4)
    assert operator.remove_structures(weight, NOTHING, rows, columns, NOTHING).shape == (3, 0)
    assert operator.remove_rows(weight, rows, NOTHING).shape == (0, 4)
    assert operator.remove_columns(weight, columns, NOTHING).shape == (3, 0)
    assert torch.equal(operator.remove_structures(weight, NOTHING, rows.flip(0), NOTHING, columns), weight.flip(0))
    assert torch.equal(operator.remove_rows(weight, NOTHING, rows), weight)


def test_arguments_stay_as_they_are():
    problem = problem_of(4, 5, 3)
    given_tensors = (problem.weight, *problem.first, *problem.second)
    before = [tensor.clone() for tensor in given_tensors]
    operator, two = problem.operator, torch.arange(2)
    operator.remove_structures(problem.weight, two, torch.arange(2, 4), two, torch.arange(2, 5))
    operator.diagonal()
    operator.apply(problem.weight)
    assert all(torch.equal(tensor, old) for tensor, old in zip(given_tensors, before, strict=True))


def test_float32_factors_are_decomposed_in_float64(caplog):
    """``1 + s_G s_A^T`` is 1e-9 here: float32 cannot tell it from zero."""
    g, a = torch.eye(1), torch.eye(1)
    factors = (g, a), (g, -a)
    with caplog.at_level(logging.WARNING):
        operator = kronecker_sum(*factors, 1e-9, 0.0, "block 3")
    assert not caplog.records
    cost = operator.row_costs(torch.tensor([[2.0]]))
    assert cost.dtype == torch.float32
    assert float(cost) == pytest.approx(0.5 * 4 * 1e-9, rel=1e-5)


def test_results_have_the_type_of_the_weight():
    problem = problem_of(3, 4, 0)
    weight, two = problem.weight.float(), torch.tensor([0, 1])
    operator = problem.operator
    results = (
        operator.element_costs(weight),
        operator.row_costs(weight),
        operator.column_costs(weight),
        operator.independent_element_costs(weight),
        operator.independent_row_costs(weight),
        operator.independent_column_costs(weight),
        operator.remove_rows(weight, two, torch.tensor([2])),
        operator.remove_columns(weight, two, torch.tensor([2, 3])),
        operator.remove_structures(weight, two, torch.tensor([2]), two, torch.tensor([2, 3])),
        operator.apply(weight),
    )
    assert {result.dtype for result in results} == {torch.float32}


@pytest.mark.parametrize("side", [0, 1])
def test_both_dampings_escalate_until_the_sum_is_positive(side, caplog):
    """``G1 = A1 = I`` and a second term of -1.1 in one direction: level 0.01 is too little, 0.1 is enough."""
    first = torch.eye(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    second = [torch.zeros_like(first[0]), torch.zeros_like(first[1])]
    second[side][0, 0], second[1 - side][0, 0] = 1.0, -1.1
    with caplog.at_level(logging.WARNING):
        operator = kronecker_sum(first, tuple(second), 0.01, 0.02, "block 3")
    assert "block 3" in caplog.text
    assert operator.gradients.damping == pytest.approx(0.1)
    assert operator.inputs.damping == pytest.approx(0.2)
    dense = torch.kron(damped(first[0], 0.1), damped(first[1], 0.2)) + torch.kron(*second)
    close(operator.diagonal(), dense.diagonal().view(2, 3))
    cost = operator.element_costs(torch.ones(2, 3, dtype=torch.float64))
    close(cost, 0.5 / torch.linalg.inv(dense).diagonal().view(2, 3))


@pytest.mark.parametrize("side", [0, 1])
def test_dampings_escalate_for_an_indefinite_first_factor_too(side, caplog):
    first = [torch.eye(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)]
    first[side][0, 0] = -0.05
    zero = torch.zeros_like(first[0]), torch.zeros_like(first[1])
    with caplog.at_level(logging.WARNING):
        operator = kronecker_sum(tuple(first), zero, 0.01, 0.01, "block 3")
    assert len(caplog.records) == 1
    assert operator.gradients.damping == operator.inputs.damping == pytest.approx(0.1)


def test_enough_damping_is_left_alone(caplog):
    with caplog.at_level(logging.WARNING):
        operator = problem_of(4, 4, 0).operator
    assert not caplog.records
    assert (operator.gradients.damping, operator.inputs.damping) == (DAMPING_G, DAMPING_A)


def test_what_no_damping_mends_is_an_error_that_names_the_layer():
    g, a = torch.eye(2, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    last = (1 + 0.01 * ESCALATION**MAX_ESCALATIONS) ** 2
    assert kronecker_sum((g, a), (g, -0.99 * last * a), 0.01, 0.01, "block 3").inputs.damping == pytest.approx(100)
    with pytest.raises(NotPositiveDefiniteError, match=r"block 3.*100"):
        kronecker_sum((g, a), (g, -1.01 * last * a), 0.01, 0.01, "block 3")


def test_a_singular_sum_is_not_positive_definite():
    """Exactly singular, but for the rounding of its spectra."""
    problem = problem_of(5, 6, 0)
    g, a = problem.first
    with pytest.raises(NotPositiveDefiniteError):
        kronecker_sum((g, a), (-g, a), 0.0, 0.0, "block 3")


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_factors_are_an_error_that_names_the_layer(position, bad):
    factors = [torch.eye(3) for _ in range(4)]
    factors[position][0, 1] = bad
    with pytest.raises(NonFiniteError, match="block 3"):
        kronecker_sum(tuple(factors[:2]), tuple(factors[2:]), 0.1, 0.1, "block 3")


@pytest.mark.parametrize("shape", [(40, 7), (16, 16), (3, 50)])
def test_the_estimate_of_bytes_covers_what_is_held_and_is_no_wild_guess(shape):
    rows, columns = shape
    first = torch.eye(rows), torch.eye(columns)
    operator = kronecker_sum(first, first, 0.1, 0.1, "block 3")
    held = [getattr(side, field.name) for side in (operator.gradients, operator.inputs) for field in fields(side)]
    held_bytes = sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor))
    given_bytes = 2 * (first[0].nbytes + first[1].nbytes)
    estimate = kronecker_sum_bytes(rows, columns, 4)
    assert held_bytes + given_bytes < estimate < 6 * (held_bytes + given_bytes)
    assert kronecker_sum_bytes(rows, columns, 8) - estimate == given_bytes
