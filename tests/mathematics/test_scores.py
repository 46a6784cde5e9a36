"""Scores against plain loops."""

import math

import pytest
import torch

from llm_surgeon import PruneConfig
from llm_surgeon.mathematics.scores import SCORES, ScoreOptions, Statistics, stochastic_relative_importance
from llm_surgeon.recipe.methods import LAYERWISE, register_score

ROWS, COLUMNS = 5, 7


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float64)
    x = torch.rand(COLUMNS, generator=generator, dtype=torch.float64) + 0.1
    y = torch.rand(ROWS, generator=generator, dtype=torch.float64) + 0.1
    return weight, x, y


def norm(values, p):
    return sum(abs(float(value)) ** p for value in values) ** (1 / p)


# Each: the score of weight (r, c), from the whole matrix and both norms, as the papers print it.
BY_HAND = {
    "magnitude": lambda w, x, y, r, c: abs(w[r][c]),
    "wanda": lambda w, x, y, r, c: abs(w[r][c]) * x[c],
    "owanda": lambda w, x, y, r, c: abs(w[r][c]) * y[r],
    "symwanda": lambda w, x, y, r, c: abs(w[r][c]) * (x[c] + y[r]),
    "symmetric": lambda w, x, y, r, c: (
        abs(w[r][c]) * math.sqrt(norm(w[r], 2) ** 2 + norm([row[c] for row in w], 2) ** 2)
    ),
    "ri": lambda w, x, y, r, c: abs(w[r][c]) * (1 / norm(w[r], 1) + 1 / norm([row[c] for row in w], 1)),
    "lp-ri": lambda w, x, y, r, c: abs(w[r][c]) * (1 / norm(w[r], 3) + 1 / norm([row[c] for row in w], 3)),
    "ria": lambda w, x, y, r, c: (
        abs(w[r][c]) * (1 / norm(w[r], 1) + 1 / norm([row[c] for row in w], 1)) * math.sqrt(x[c])
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_are_what_the_papers_print(name, problem):
    weight, x, y = problem
    scores = SCORES[name](weight, Statistics(x, y), ScoreOptions(p=3.0))
    for r in range(ROWS):
        for c in range(COLUMNS):
            by_hand = BY_HAND[name](weight.tolist(), x.tolist(), y.tolist(), r, c)
            assert float(scores[r, c]) == pytest.approx(by_hand, rel=1e-12)


def test_every_layerwise_method_but_the_solver_has_a_score():
    assert set(SCORES) == set(LAYERWISE) - {"sparsegpt"}
    assert set(BY_HAND) == set(SCORES) - {"stochria"}


@pytest.mark.parametrize("name", [name for name, row in LAYERWISE.items() if not row.data])
def test_what_reads_no_data_does_not_depend_on_it(name, problem):
    weight, x, y = problem
    one, other = (SCORES[name](weight, Statistics(k * x, y.flip(0)), ScoreOptions()) for k in (1, 5))
    assert torch.equal(one, other)


def test_the_whole_is_a_subset_too(problem):
    weight, x, y = problem
    for activation, plain in ((True, "ria"), (False, "ri")):
        options = ScoreOptions(ratio=1.0, activation=activation)
        torch.testing.assert_close(
            SCORES["stochria"](weight, Statistics(x, y), options), SCORES[plain](weight, Statistics(x, y), options)
        )


def test_subsets_are_drawn_by_the_seed_each_row_and_column_its_own():
    # Ones everywhere: the norm of a subset is its size, whoever is in it.
    ones = torch.ones(40, 60)
    torch.testing.assert_close(stochastic_relative_importance(ones, 0.25, 0), torch.full((40, 60), 1 / 15 + 1 / 10))
    weight = torch.rand(40, 60, generator=torch.Generator().manual_seed(0))
    scores = stochastic_relative_importance(weight, 0.25, 3)
    assert torch.equal(scores, stochastic_relative_importance(weight, 0.25, 3))
    assert not torch.equal(scores, stochastic_relative_importance(weight, 0.25, 4))
    # What multiplies a row is 1 / (sum of some quarter of it); equal rows differ, as their subsets do.
    equal = weight[:1].expand(40, 60)
    assert len(stochastic_relative_importance(equal, 0.25, 0)[:, 0].unique()) > 1


def test_empty_rows_and_columns_score_zero():
    weight = torch.zeros(4, 6)
    weight[1, 2] = 3.0
    for name in SCORES:
        scores = SCORES[name](weight, Statistics(torch.ones(6), torch.ones(4)), ScoreOptions(ratio=0.2))
        assert scores.isfinite().all()
        assert scores[weight == 0].eq(0).all()


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="taken"):
        register_score("wanda", SCORES["wanda"])


def test_a_score_of_ones_own_is_a_method():
    register_score("squared", lambda weight, statistics, _: weight.square() * statistics.input_norm, scope="layer")
    try:
        config = PruneConfig(method="squared")
        assert config.layerwise
        assert config.resolved_scope == "layer"
        assert config.structure == "unstructured"
    finally:
        del LAYERWISE["squared"], SCORES["squared"]
