"""The dense Fisher against constrained least squares, and approximations against the dense Fisher of their matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_surgeon.errors import NonFiniteError, NotPositiveDefiniteError
from llm_surgeon.mathematics.dense_fisher import DenseFisher
from llm_surgeon.mathematics.fisher import Damping, Diagonal, KroneckerProduct, Solver, Split, SumOfTwo
from oracles import constrained_minimum, random_factor, removed_mask

EXACT = Solver(steps=500, tolerance=1e-14)
DAMPING = Damping(a=0.05, g=0.2)
UNDAMPED = Damping(a=0.0, g=0.0)
shapes = {"rows": st.integers(1, 5), "columns": st.integers(1, 5), "seed": st.integers(0, 999)}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def damped(matrix, fraction):
    return matrix + fraction * float(matrix.diagonal().mean()) * torch.eye(len(matrix), dtype=matrix.dtype)


def halves(size, generator):
    """Some positions kept, some removed, the rest dead by implication."""
    role = torch.randint(3, (size,), generator=generator)
    return Split((role == 0).nonzero().flatten(), (role == 1).nonzero().flatten())


class TestAgainstLeastSquares:
    """With a Fisher that has no structure at all, and damping."""

    @pytest.fixture(params=range(4))
    def problem(self, request):
        generator = torch.Generator().manual_seed(request.param)
        weight = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        return generator, weight, random_factor(12, generator)

    def test_costs_of_any_set_are_minima_or_the_price_of_zeroing_alone(self, problem):
        generator, weight, matrix = problem
        fisher = DenseFisher(matrix, 0.1, "layer")
        for _ in range(5):
            removed = torch.rand(3, 4, generator=generator) < 0.4
            expected, _ = constrained_minimum(damped(matrix, 0.1), weight.flatten(), removed.flatten())
            assert fisher.cost(weight, removed, correlated=True) == pytest.approx(expected, rel=1e-8, abs=1e-12)
            change = (weight * removed).flatten()
            alone = float(0.5 * change @ matrix @ change)
            assert fisher.cost(weight, removed, correlated=False) == pytest.approx(alone, rel=1e-8, abs=1e-12)

    def test_the_change_is_the_minimiser_and_costs_what_was_said(self, problem):
        generator, weight, matrix = problem
        fisher = DenseFisher(matrix, 0.1, "layer")
        removed = torch.rand(3, 4, generator=generator) < 0.4
        change = fisher.change(weight, removed)
        _, expected = constrained_minimum(damped(matrix, 0.1), weight.flatten(), removed.flatten())
        close(change, expected.view(3, 4))
        price = float(0.5 * change.flatten() @ fisher.damped_matrix() @ change.flatten())
        assert fisher.cost(weight, removed, correlated=True) == pytest.approx(price, rel=1e-8, abs=1e-12)

    def test_the_dead_take_no_part_in_an_update_of_rows_and_columns(self, problem):
        generator, weight, matrix = problem
        rows, columns = halves(3, generator), halves(4, generator)
        found = DenseFisher(matrix, 0.1, "layer").remove_rows_and_columns(weight, rows, columns, EXACT)
        there = torch.cat([rows.kept, rows.removed]), torch.cat([columns.kept, columns.removed])
        index = (there[0].sort().values[:, None] * 4 + there[1].sort().values).flatten()
        removed = removed_mask(3, 4, rows.removed, columns.removed)[index]
        _, change = constrained_minimum(damped(matrix, 0.1)[index][:, index], weight.flatten()[index], removed)
        whole = weight.flatten().index_add(0, index, change).view(3, 4)
        close(found, whole[rows.kept][:, columns.kept])

    def test_no_other_set_of_weights_in_its_place_is_cheaper(self, problem):
        """Whatever the others do beside the update, the price goes up."""
        generator, weight, matrix = problem
        fisher = DenseFisher(matrix, 0.0, "layer")
        removed = torch.rand(3, 4, generator=generator) < 0.4
        best = fisher.change(weight, removed).flatten()
        for _ in range(10):
            other = best + torch.randn(12, generator=generator, dtype=torch.float64) * ~removed.flatten()
            assert other @ matrix @ other > best @ matrix @ best


class Approximation:
    """One approximation, the dense Fisher that costs are of, and the one that updates are of."""

    def __init__(self, rows, columns, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(rows, columns, generator=self.generator, dtype=torch.float64)
        self.g, self.a = random_factor(rows, self.generator), random_factor(columns, self.generator)
        self.prepare()


class Product(Approximation):
    """Costs without damping: their numerators are never damped, so that no one matrix has all of them."""

    def prepare(self):
        self.fast = KroneckerProduct(self.g, self.a, UNDAMPED, "layer")
        self.dense = DenseFisher(torch.kron(self.g, self.a), 0.0, "layer")
        self.updating = KroneckerProduct(self.g, self.a, DAMPING, "layer")
        matrix = torch.kron(damped(self.g, DAMPING.g), damped(self.a, DAMPING.a))
        self.dense_updating = DenseFisher(matrix, 0.0, "layer")


class Inputs(Approximation):
    """The identity in place of the gradient factor."""

    def prepare(self):
        eye = torch.eye(len(self.g), dtype=torch.float64)
        self.fast = self.updating = KroneckerProduct(None, self.a, UNDAMPED, "layer")
        self.dense = self.dense_updating = DenseFisher(torch.kron(eye, self.a), 0.0, "layer")


class Sum(Approximation):
    """Independent costs are undamped, all others damped."""

    def prepare(self):
        second = tuple(0.1 * random_factor(len(factor), self.generator) for factor in (self.g, self.a))
        self.fast = self.updating = SumOfTwo((self.g, self.a), second, DAMPING, "layer")
        undamped = torch.kron(self.g, self.a) + torch.kron(*second)
        matrix = torch.kron(damped(self.g, DAMPING.g), damped(self.a, DAMPING.a)) + torch.kron(*second)

        class Dense(DenseFisher):
            def damped_matrix(self):
                return matrix

        self.dense = self.dense_updating = Dense(undamped, 0.0, "layer")


class Exact(Approximation):
    """The diagonal, of which correlated and independent are the same."""

    def prepare(self):
        diagonal = torch.rand(self.weight.shape, generator=self.generator, dtype=torch.float64) + 0.1
        self.fast = self.updating = Diagonal(diagonal)
        self.dense = self.dense_updating = DenseFisher(diagonal.flatten().diag(), 0.0, "layer")


APPROXIMATIONS = pytest.mark.parametrize("kind", [Product, Inputs, Sum, Exact])


@APPROXIMATIONS
@pytest.mark.parametrize("correlated", [True, False])
@settings(deadline=None, max_examples=15)
@given(**shapes)
def test_costs_are_those_of_the_dense_matrix(kind, correlated, rows, columns, seed):
    problem = kind(rows, columns, seed)
    fast, dense, weight = problem.fast, problem.dense, problem.weight
    close(fast.element_costs(weight, correlated=correlated), dense.element_costs(weight, correlated=correlated))
    close(fast.row_costs(weight, correlated=correlated), dense.row_costs(weight, correlated=correlated))
    close(fast.column_costs(weight, correlated=correlated), dense.column_costs(weight, correlated=correlated))
    for axis, size in (("rows", rows), ("columns", columns)):
        members = 1 if kind is Sum else max(1, size // 2)  # recipes do not ask a sum of two for more
        sets = torch.randperm(size, generator=problem.generator)[: size // members * members].view(-1, members)
        valid = torch.rand(sets.shape, generator=problem.generator) < 0.7
        found = fast.set_costs(weight, axis, sets, valid, correlated=correlated)
        close(found, dense.set_costs(weight, axis, sets, valid, correlated=correlated))


@APPROXIMATIONS
@settings(deadline=None, max_examples=15)
@given(**shapes, size=st.integers(0, 4))
def test_updates_are_those_of_the_dense_matrix(kind, rows, columns, seed, size):
    problem = kind(rows, columns, seed)
    solver = EXACT if kind is Sum else Solver(size, EXACT.steps, EXACT.tolerance)
    splits = halves(rows, problem.generator), halves(columns, problem.generator)
    found = problem.updating.remove_rows_and_columns(problem.weight, *splits, solver)
    close(found, problem.dense_updating.remove_rows_and_columns(problem.weight, *splits, solver))
    kept = torch.rand(rows, columns, generator=problem.generator) < 0.6
    found = problem.updating.remove_elements(problem.weight, kept, solver)
    close(found, problem.dense_updating.remove_elements(problem.weight, kept, solver))


def test_an_approximation_overrides_only_its_matrix():
    """All operations of one that is given by its blocks, without a line about them."""
    blocks = [random_factor(4, torch.Generator().manual_seed(seed)) for seed in range(3)]

    class ByRows(DenseFisher):
        def __init__(self):
            super().__init__(torch.empty(0, 0), 0.0, "layer")

        def matrix(self):
            return torch.block_diag(*blocks)

    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.stack([0.5 * row @ block @ row for row, block in zip(weight, blocks, strict=True)])
    for correlated in (True, False):
        close(ByRows().row_costs(weight, correlated=correlated), expected)


def test_results_have_the_type_of_the_weight():
    weight, fisher = torch.ones(2, 2), DenseFisher(torch.eye(4), 0.0, "layer")
    every = Split(torch.arange(2), torch.arange(0))
    assert fisher.element_costs(weight, correlated=True).dtype == torch.float32
    assert fisher.remove_elements(weight, weight > 0, EXACT).dtype == torch.float32
    assert fisher.remove_rows_and_columns(weight, every, every, EXACT).dtype == torch.float32


def test_a_set_of_nothing_costs_nothing():
    fisher, nothing = DenseFisher(torch.eye(4), 0.0, "layer"), torch.zeros(1, 2, dtype=torch.bool)
    sets = torch.tensor([[0, 1]])
    for correlated in (True, False):
        assert not fisher.set_costs(torch.ones(2, 2), "rows", sets, nothing, correlated=correlated).any()


def test_a_removal_that_would_gain_something_costs_nothing():
    fisher = DenseFisher(torch.diag(torch.tensor([-2.0, 1.0])), 0.0, "layer")
    assert fisher.element_costs(torch.ones(1, 2), correlated=False).tolist() == [[0.0, 0.5]]


def test_a_matrix_without_a_decomposition_is_an_error():
    weight = torch.ones(1, 2)
    with pytest.raises(NotPositiveDefiniteError, match="fc1"):
        DenseFisher(torch.ones(2, 2), 0.0, "fc1").row_costs(weight, correlated=True)
    with pytest.raises(NonFiniteError, match="fc1"):
        DenseFisher(torch.full((2, 2), torch.nan), 0.1, "fc1").row_costs(weight, correlated=True)
