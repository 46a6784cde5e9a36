import math

import pytest
import torch

from llm_surgeon.pruning.histogram import HIGHEST, LOWEST, cost_histogram


def test_every_candidate_is_counted_once_in_the_bin_of_its_score():
    scores = torch.tensor([1e-3, 2e-3, 0.5, 7.0, 0.0, 90.0])
    goes = torch.tensor([True, True, False, True, True, False])
    found = cost_histogram([(scores[:2], goes[:2]), (scores[2:], goes[2:])], "cost", 2e-3)
    assert sum(found.removed) == 3
    assert sum(found.kept) == 2
    assert found.outside == 1
    assert found.threshold == 2e-3
    assert len(found.exponents) == len(found.kept) + 1 == len(found.removed) + 1
    for score, gone in zip(scores.tolist(), goes.tolist(), strict=True):
        if score:
            bins = [
                count
                for count, low, high in zip(
                    found.removed if gone else found.kept, found.exponents, found.exponents[1:], strict=False
                )
                if low <= math.log10(score) <= high
            ]
            assert max(bins) >= 1
    # Nothing but filled bins at the ends.
    assert found.kept[0] + found.removed[0] > 0
    assert found.kept[-1] + found.removed[-1] > 0


def test_scores_beyond_the_axis_are_counted_at_its_ends():
    scores = torch.tensor([1e-44, 1e30], dtype=torch.float64)
    found = cost_histogram([(scores, torch.tensor([False, True]))], "cost", 0.0)
    assert (found.exponents[0], found.exponents[-1]) == (LOWEST, HIGHEST)
    assert (found.kept[0], found.removed[-1]) == (1, 1)


@pytest.mark.parametrize(
    "scored", [[], [(torch.zeros(3), torch.ones(3).bool())], [(torch.zeros(0), torch.zeros(0).bool())]]
)
def test_nothing_to_draw_is_no_error(scored):
    found = cost_histogram(scored, "cost", float("-inf"))
    assert sum(found.kept) == sum(found.removed) == 0
    assert found.threshold == 0.0
    assert found.outside == sum(len(scores) for scores, _ in scored)
