import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_surgeon.mathematics.owl import outlier_ratio, outlier_weighted


def test_outliers_are_counted_over_all_layers_of_a_block():
    # Mean 2.0: one of ten exceeds five times that.
    assert outlier_ratio([torch.ones(2, 4), torch.tensor([0.0, 12.0])], 5.0) == 0.1
    assert outlier_ratio([torch.ones(3, 3)], 5.0) == 0.0


def test_more_outliers_keep_more_over_the_whole_spread():
    budgets = outlier_weighted([0.01, 0.02, 0.05], [100, 100, 100], 0.6, 0.08)
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] - budgets[-1] == pytest.approx(0.16)
    # Linear in between: a quarter of the way.
    assert budgets[0] - budgets[1] == pytest.approx(0.04)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), min_size=1, max_size=20),
    st.floats(0.2, 0.8),
    st.floats(0.01, 0.1),
)
def test_the_target_is_met_whatever_the_sizes(blocks, sparsity, spread):
    ratios, weights = zip(*blocks, strict=True)
    budgets = outlier_weighted(ratios, weights, sparsity, spread)
    removed = sum(budget * count for budget, count in zip(budgets, weights, strict=True))
    assert removed == pytest.approx(sparsity * sum(weights))


def test_equal_blocks_lose_equally():
    assert outlier_weighted([0.1, 0.1], [5, 9], 0.5, 0.08) == [0.5, 0.5]


def test_budgets_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match="block 0"):
        outlier_weighted([0.0, 1.0], [1, 1], 0.95, 0.08)
