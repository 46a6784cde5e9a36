from itertools import combinations, permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_surgeon.mathematics.channel_permutation import _reassign, assignment_benefit, deal, find_permutation, retained
from llm_surgeon.mathematics.nm_pattern import Pattern

PATTERNS = [Pattern(2, 4), Pattern(4, 8), Pattern(1, 4), Pattern(3, 4), Pattern(1, 2), Pattern(2, 3)]


def random_scores(seed, rows=6, columns=8, dtype=torch.float64):
    """Few channels are much stronger than the others, as in a network."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(columns, generator=generator, dtype=torch.float64).pow(-0.7)
    return (torch.rand(rows, columns, generator=generator, dtype=torch.float64) * strength).to(dtype)


def slowly_retained(scores, groups, kept):
    """The definition, for groups given as lists of channels."""
    return sum(sum(sorted((row[c] for c in group), reverse=True)[:kept]) for row in scores.tolist() for group in groups)


def partitions(channels, size):
    """Every way to cut channels into groups, once."""
    if not channels:
        yield []
        return
    first, *rest = channels
    for others in combinations(rest, size - 1):
        left = [c for c in rest if c not in others]
        for more in partitions(left, size):
            yield [[first, *others], *more]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_retained_is_the_sum_of_the_best(pattern):
    scores = random_scores(1, columns=pattern.group * 3)
    groups = torch.arange(pattern.group * 3).view(3, -1).tolist()
    assert retained(scores, pattern) == pytest.approx(slowly_retained(scores, groups, pattern.kept))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([(2, 4, 8), (1, 4, 8), (3, 4, 8), (1, 2, 6), (2, 3, 9)]))
def test_between_identity_and_the_exhaustive_optimum(seed, case):
    kept, group, columns = case
    scores, pattern = random_scores(seed, columns=columns), Pattern(kept, group)
    permutation = find_permutation(scores, pattern, sweeps=2)
    assert sorted(permutation.tolist()) == list(range(columns))
    optimum = max(slowly_retained(scores, groups, kept) for groups in partitions(list(range(columns)), group))
    found = retained(scores[:, permutation], pattern)
    assert retained(scores, pattern) <= found <= optimum * (1 + 1e-12)


def test_mostly_near_the_exhaustive_optimum():
    """Of what could be gained over the identity, most is."""
    pattern, gained, possible = Pattern(2, 4), 0.0, 0.0
    for seed in range(40):
        scores = random_scores(seed)
        start = retained(scores, pattern)
        gained += retained(scores[:, find_permutation(scores, pattern)], pattern) - start
        possible += max(slowly_retained(scores, groups, 2) for groups in partitions(list(range(8)), 4)) - start
    assert gained > 0.8 * possible


@pytest.mark.parametrize(("pattern", "groups"), [(p, g) for p in PATTERNS for g in (2, 5)], ids=str)
def test_adjacent_strong_channels_are_spread_optimally(pattern, groups):
    """As many strong channels as the pattern keeps, all in front: the optimum keeps every one of them."""
    strong = pattern.kept * groups
    scores = torch.cat(
        [1 + torch.rand(7, strong), 0.1 * torch.rand(7, pattern.group * groups - strong)], dim=1
    ).double()
    permutation = find_permutation(scores, pattern)
    assert retained(scores[:, permutation], pattern) == pytest.approx(float(scores[:, :strong].sum()))
    assert retained(scores, pattern) < 0.9 * float(scores[:, :strong].sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("at_once", [3, 40, 1 << 19])
def test_benefit_is_what_a_group_retains_with_the_candidate(pattern, at_once, monkeypatch):
    """Up to the sum of the N - 1 best of the others, which the candidate has no part in."""
    monkeypatch.setattr("llm_surgeon.mathematics.channel_permutation._AT_ONCE_CPU", at_once)
    groups, rows = 5, 7
    generator = torch.Generator().manual_seed(pattern.group)
    others = torch.rand(groups, pattern.group - 1, rows, generator=generator, dtype=torch.float64)
    candidates = torch.rand(groups, rows, generator=generator, dtype=torch.float64)
    benefit = assignment_benefit(others, candidates, pattern.kept)
    for i in range(groups):
        without = sum(sum(sorted(others[i, :, r].tolist())[::-1][: pattern.kept - 1]) for r in range(rows))
        for j in range(groups):
            members = torch.cat([others[i], candidates[j : j + 1]]).T
            expected = slowly_retained(members, [range(pattern.group)], pattern.kept) - without
            assert float(benefit[i, j]) == pytest.approx(expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_one_position_is_reassigned_optimally(pattern):
    scores = random_scores(4, columns=4 * pattern.group)
    groups = torch.randperm(4 * pattern.group, generator=torch.Generator().manual_seed(1)).view(4, -1)
    position = pattern.group - 1
    found = _reassign(scores.T.contiguous(), groups, position, pattern.kept)
    assert torch.equal(found[:, :position], groups[:, :position])
    rest, taken = groups[:, :position].tolist(), groups[:, position].tolist()
    optimum = max(
        slowly_retained(scores, [[*others, c] for others, c in zip(rest, order, strict=True)], pattern.kept)
        for order in permutations(taken)
    )
    assert slowly_retained(scores, found.tolist(), pattern.kept) == pytest.approx(optimum, rel=1e-9)
    assert slowly_retained(scores, groups.tolist(), pattern.kept) < (1 - 1e-5) * optimum


def test_sweeps_gain_over_dealing():
    pattern = Pattern(2, 4)
    scores = random_scores(5, rows=40, columns=64, dtype=torch.float32)
    values = [retained(scores[:, find_permutation(scores, pattern, sweeps)], pattern) for sweeps in (0, 1, 3)]
    assert retained(scores, pattern) < values[0] < values[1] < values[2]


def test_the_identity_is_returned_if_nothing_is_better():
    scores = torch.ones(3, 12)
    assert torch.equal(find_permutation(scores, Pattern(2, 4)), torch.arange(12))


def test_dealing_spreads_the_strong_and_balances():
    groups = deal(torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1]), 4)
    assert groups.tolist() == [[0, 3, 4, 7], [1, 2, 5, 6]]


def test_one_group_and_widths_that_do_not_fit():
    assert torch.equal(find_permutation(random_scores(0, columns=4), Pattern(2, 4)), torch.arange(4))
    with pytest.raises(RuntimeError):
        find_permutation(random_scores(0, columns=6), Pattern(2, 4))
