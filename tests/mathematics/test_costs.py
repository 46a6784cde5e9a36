import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_surgeon.mathematics.costs import column_costs, row_costs, row_set_costs
from llm_surgeon.mathematics.linalg import damped_cholesky, damping_of, inverse
from oracles import constrained_minimum, fisher, random_factor, removed_mask

EMPTY = torch.tensor([], dtype=torch.long)


def problem(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, random_factor(columns, generator), random_factor(rows, generator)


@settings(deadline=None, max_examples=20)
@given(rows=st.integers(2, 6), columns=st.integers(2, 7), seed=st.integers(0, 1000))
def test_row_and_column_costs_equal_constrained_least_squares(rows, columns, seed):
    weight, a, g = problem(rows, columns, seed)
    by_row = row_costs(weight, a, inverse(torch.linalg.cholesky(g)).diagonal())
    by_column = column_costs(weight, g, inverse(torch.linalg.cholesky(a)).diagonal())
    hessian, theta = fisher(a, g), weight.flatten()
    for r in range(rows):
        expected, _ = constrained_minimum(hessian, theta, removed_mask(rows, columns, torch.tensor([r]), EMPTY))
        assert abs(float(by_row[r]) - expected) <= 1e-8 * max(1, abs(expected))
    for c in range(columns):
        expected, _ = constrained_minimum(hessian, theta, removed_mask(rows, columns, EMPTY, torch.tensor([c])))
        assert abs(float(by_column[c]) - expected) <= 1e-8 * max(1, abs(expected))


def test_the_loss_really_rises_as_predicted_while_the_removal_is_small():
    """Finite differences of a true loss: the expected loss of a softmax layer under its own predictions.

    Its gradient vanishes and its Hessian is the Fisher ``G (x) a a^T``, ``G = diag(p) - p p^T``, so shrinking row r
    by a fraction e raises it by ``e^2`` times the row's cost, up to higher orders.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    token = torch.randn(3, generator=generator, dtype=torch.float64)
    p = torch.softmax(weight @ token, 0)
    g, a = torch.diag(p) - torch.outer(p, p), torch.outer(token, token)

    def loss(w):
        return float(-(p * torch.log_softmax(w @ token, 0)).sum())

    # Nothing else moves, so the cost is that of independent structures: [G^-1]_rr becomes 1 / G_rr.
    costs = row_costs(weight, a, 1 / g.diagonal())
    for row in range(4):
        errors = []
        for fraction in (1e-2, 1e-3):
            shrunk = weight.clone()
            shrunk[row] *= 1 - fraction
            rise = (loss(shrunk) - loss(weight)) / fraction**2
            errors.append(abs(rise - float(costs[row])) / float(costs[row]))
        assert errors[1] < 1e-2
        assert errors[1] < 0.2 * errors[0]


def test_dead_rows_and_columns_cost_nothing():
    weight, a, g = problem(4, 5, 0)
    weight[1] = 0
    weight[:, 3] = 0
    assert float(row_costs(weight, a, inverse(torch.linalg.cholesky(g)).diagonal())[1]) == 0
    assert float(column_costs(weight, g, inverse(torch.linalg.cholesky(a)).diagonal())[3]) == 0


def test_damping_enters_the_inverse_and_not_the_numerator():
    weight, a, g = problem(3, 4, 1)
    lam = damping_of(g, 0.1)
    diagonal = inverse(damped_cholesky(g, lam, "g")).diagonal()
    expected = (
        0.5 * (weight @ a @ weight.T).diagonal() / torch.linalg.inv(g + lam * torch.eye(3, dtype=g.dtype)).diagonal()
    )
    torch.testing.assert_close(row_costs(weight, a, diagonal), expected, rtol=1e-10, atol=0)


@settings(deadline=None, max_examples=30)
@given(rows=st.integers(2, 6), columns=st.integers(1, 5), seed=st.integers(0, 1000), data=st.data())
def test_joint_costs_of_sets_equal_constrained_least_squares(rows, columns, seed, data):
    """Sets of different sizes in one call, whole layers included."""
    weight, a, g = problem(rows, columns, seed)
    members = st.lists(st.integers(0, rows - 1), min_size=1, max_size=rows, unique=True)
    sets = [*data.draw(st.lists(members, min_size=1, max_size=3)), list(range(rows))]
    padded, valid = (
        torch.nn.utils.rnn.pad_sequence([make(s) for s in sets], batch_first=True)
        for make in (torch.tensor, lambda s: torch.ones(len(s), dtype=torch.bool))
    )
    joint = row_set_costs(weight, a, g, torch.linalg.inv(g), padded, valid, "layer")
    alone = row_set_costs(weight, a, g, None, padded, valid, "layer")
    hessian, theta = fisher(a, g), weight.flatten()
    for number, chosen in enumerate(sets):
        removed = removed_mask(rows, columns, torch.tensor(chosen), EMPTY)
        expected, _ = constrained_minimum(hessian, theta, removed)
        torch.testing.assert_close(float(joint[number]), expected, rtol=1e-8, atol=1e-8)
        # Nothing else moves: the quadratic form at minus the removed weights.
        change = -theta * removed
        expected = float(0.5 * change @ hessian @ change)
        torch.testing.assert_close(float(alone[number]), expected, rtol=1e-8, atol=1e-8)


def test_sets_of_correlated_rows_cost_more_than_their_rows():
    """Either of two equal gradients could make up for the other; once both are gone, nothing can."""
    weight, a, _ = problem(2, 3, 0)
    g = torch.tensor([[1.0, 0.99], [0.99, 1.0]], dtype=torch.float64)
    inverse = torch.linalg.inv(g)
    pair, both = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    joint = row_set_costs(weight.abs(), a.abs(), g, inverse, pair, both, "layer")
    assert float(joint) > 10 * float(row_costs(weight.abs(), a.abs(), inverse.diagonal()).sum())


def test_what_is_padding_takes_no_part():
    weight, a, g = problem(4, 3, 2)
    inverse = torch.linalg.inv(g)
    sets, valid = torch.tensor([[1, 3, 0]]), torch.tensor([[True, False, False]])
    cost = row_set_costs(weight, a, g, inverse, sets, valid, "layer")
    torch.testing.assert_close(cost[0], row_costs(weight, a, inverse.diagonal())[1])
