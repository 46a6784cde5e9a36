import pytest
import torch

from llm_surgeon.errors import NonFiniteError
from llm_surgeon.mathematics import newton_gates
from llm_surgeon.mathematics.newton_gates import (
    LARGEST_CHANGE,
    LONGEST,
    MOST_DOUBLINGS,
    effects,
    evidence_damping,
    log_evidence,
    newton_step,
    rise_at,
    step_length,
)

GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def test_effects_are_derivatives_by_gates_of_each_token():
    """By autograd, with a gate of its own at each token; two of the five values have no gate."""
    values, weight, members = draw(7, 5), draw(5, 4), torch.tensor([1, -1, 0, 1, -1])
    own = torch.ones(7, 2, dtype=torch.float64, requires_grad=True)
    at = torch.cat([own, torch.ones(7, 1, dtype=torch.float64)], dim=1)[:, members]
    gated = values * at
    loss = torch.tanh(gated @ weight).square().sum()
    gradients, expected = torch.autograd.grad(loss, (gated, own))

    found = effects(values, gradients, members, 2)

    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_effects_are_the_same_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    values, gradients = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    members = torch.tensor([1, -1, 0, 1, -1])
    whole = effects(values, gradients, members, 2)
    for at_once in (1, 5, 12, 35):
        monkeypatch.setattr(newton_gates, "_AT_ONCE", at_once)
        torch.testing.assert_close(effects(values, gradients, members, 2), whole)
    assert effects(values[:0], gradients[:0], members, 2).shape == (0, 2)


def test_the_step_minimises_the_damped_parabola():
    slopes, root = draw(6) * 0.01, draw(40, 6)
    fisher = root.T @ root / 40
    damped = fisher + 0.3 * torch.eye(6, dtype=torch.float64)

    step = newton_step(slopes, fisher, 0.3)

    def loss(d):
        return float(slopes @ d + d @ damped @ d / 2)

    torch.testing.assert_close(step, torch.linalg.solve(damped, -slopes))
    assert loss(step) < 0
    assert all(loss(step) < loss(step + 0.01 * draw(6)) for _ in range(20))


def test_no_gate_changes_by_more_than_half():
    slopes, fisher = draw(4), torch.eye(4, dtype=torch.float64) * 0.01

    step = newton_step(slopes, fisher, 0.001)

    assert float(step.abs().max()) == pytest.approx(LARGEST_CHANGE)
    torch.testing.assert_close(step / step.norm(), -slopes / slopes.norm())


def test_effects_that_are_not_finite_are_named():
    with pytest.raises(NonFiniteError, match="the gates"):
        newton_step(torch.zeros(2), torch.full((2, 2), float("inf")), 0.1)


@pytest.mark.parametrize("damping", [0.02, 0.3, 5.0])
def test_evidence_is_the_mean_likelihood_of_gates_that_the_damping_allows(damping):
    """By a sum over a grid, of what two gates make of the text and of how probable they were."""
    tokens, root = 30, draw(9, 2)
    slopes, fisher = 0.2 * draw(2), root.T @ root / 9
    deviation = (tokens * damping) ** -0.5
    axis = torch.linspace(-8 * deviation, 8 * deviation, 801, dtype=torch.float64)
    changes = torch.cartesian_prod(axis, axis)
    prior = torch.exp(-changes.square().sum(1) * tokens * damping / 2)
    rise = changes @ slopes + ((changes @ fisher) * changes).sum(1) / 2
    expected = (prior * torch.exp(-tokens * rise)).sum() / prior.sum()

    assert log_evidence(slopes, fisher, damping, tokens) == pytest.approx(float(expected.log()), rel=1e-6)


@pytest.mark.parametrize("ratio", [1 / 32, 1.0, 32.0])
def test_the_damping_is_that_of_the_distribution_that_gates_were_drawn_from(ratio):
    """Drawn with a damping of so many means of the Fisher's diagonal; the slopes are those of as many tokens."""
    gates, tokens = 300, 5000
    root = draw(600, gates) * torch.logspace(0.5, -0.5, gates, dtype=torch.float64)
    fisher = root.T @ root / 600
    damping = ratio * float(fisher.diagonal().mean())
    changes = draw(gates) * (tokens * damping) ** -0.5
    noise = torch.linalg.cholesky(fisher) @ draw(gates) * tokens**-0.5

    found = evidence_damping(-fisher @ changes + noise, fisher, tokens)

    assert 1 / 2 <= found / damping <= 2
    largest = log_evidence(-fisher @ changes + noise, fisher, found, tokens)
    for other in (found / 2, found * 2):
        assert log_evidence(-fisher @ changes + noise, fisher, other, tokens) < largest


def test_slopes_that_are_chance_alone_are_damped_as_much_as_may_be():
    fisher = torch.eye(5, dtype=torch.float64)
    assert evidence_damping(1e-6 * draw(5), fisher, 100) == 2.0**MOST_DOUBLINGS


def test_gates_without_effects_stay():
    slopes, fisher = torch.zeros(3), torch.zeros(3, 3)
    assert not newton_step(slopes, fisher, evidence_damping(slopes, fisher, 10)).any()


@pytest.mark.parametrize("minimum", [0.2, 1.0, 1.4])
def test_the_length_is_where_a_parabola_is_lowest(minimum):
    def parabola(t):
        return 3 * (t - minimum) ** 2 - 3 * minimum**2

    slope, rise = -6 * minimum, parabola(1)

    assert step_length(slope, rise) == pytest.approx(minimum)
    assert rise_at(0.7, slope, rise) == pytest.approx(parabola(0.7))


def test_the_length_has_limits():
    # Still falling faster at the end of the step; lowest far beyond it; rising from the beginning.
    assert step_length(-1.0, -2.0) == LONGEST
    assert step_length(-1.0, -0.99) == LONGEST
    assert step_length(0.5, 1.0) == 0.0
    assert step_length(0.5, 0.2) == 0.0
