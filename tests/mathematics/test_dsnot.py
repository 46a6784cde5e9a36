import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_surgeon.mathematics.dsnot import Refinement, _largest, expected_error, refine

MODES = [None, "grow", "prune", "both"]
PATTERNS = [None, (2, 4), (4, 8), (1, 4)]


def problem(seed, rows=9, columns=24, pattern=None, dtype=torch.float64):
    """Weights, a random mask (N of every M, or half), and statistics of inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    kept, group = pattern or (columns // 2, columns)
    order = torch.rand(rows, columns // group, group, generator=generator).argsort(-1)
    keep = (order < kept).view(rows, columns)
    mean = torch.randn(columns, generator=generator, dtype=torch.float64)
    variance = torch.rand(columns, generator=generator, dtype=torch.float64) + 0.05
    norm = (100 * (mean.square() + variance)).sqrt()
    return weight.to(dtype), keep, mean.to(dtype), variance.to(dtype), norm.to(dtype)


def group_of(pattern):
    return None if pattern is None else pattern[1]


def shares(weight, keep):
    """The norms of rows and columns of the masked weights, one by one; an empty one counts as the least other."""
    rows = [sum(abs(w) for w, k in zip(*row, strict=True) if k) for row in zip(weight, keep, strict=True)]
    columns = [sum(abs(weight[r][c]) for r in range(len(weight)) if keep[r][c]) for c in range(len(weight[0]))]
    for norms in (rows, columns):
        least = min((n for n in norms if n > 0), default=math.inf)
        norms[:] = [max(n, least) for n in norms]
    return rows, columns


def one_at_a_time(weight, keep, mean, variance, norm, how, group=None):
    """The definition: one swap at a time, everything computed afresh, in Python."""
    weight, keep, mean, variance, norm = (t.tolist() for t in (weight, keep, mean, variance, norm))
    width = len(mean)
    group = group or width
    variance = [max(v, 1e-15) for v in variance]
    row_norms, column_norms = shares(weight, keep)

    def relative(r, c):
        return 1 / row_norms[r] + 1 / column_norms[c]

    def grow_metric(r, c):
        if how.reweight is None:
            return abs(weight[r][c] * mean[c]) / variance[c]
        d = 1 if how.reweight == "prune" else relative(r, c)
        return abs(weight[r][c] * mean[c]) * d / variance[c] + how.gamma_grow * abs(weight[r][c])

    def prune_metric(r, c):
        if how.reweight is None:
            return abs(weight[r][c]) * norm[c]
        d = norm[c] if how.reweight == "grow" else norm[c] ** how.alpha * relative(r, c)
        return abs(weight[r][c]) * d + how.gamma_prune * abs(weight[r][c])

    for r, row in enumerate(keep):

        def error(row=row, r=r):
            return sum(weight[r][c] * mean[c] for c in range(width) if not row[c])

        start = math.copysign(1.0, error())
        for _ in range(how.cycles):
            d = error()
            if abs(d) <= how.threshold or math.copysign(1.0, d) != start:
                break
            grow = [c for c in range(width) if not row[c] and weight[r][c] * mean[c] * d > 0]
            prune = [c for c in range(width) if row[c] and weight[r][c] * mean[c] * d < 0]
            grow = [c for c in grow if any(p // group == c // group for p in prune)]
            if not grow:
                break
            revived = max(grow, key=lambda c: (grow_metric(r, c), -c))
            pruned = min((p for p in prune if p // group == revived // group), key=lambda c: (prune_metric(r, c), c))
            row[revived], row[pruned] = True, False
            if abs(error()) >= abs(d):
                row[revived], row[pruned] = False, True
                break
    return torch.tensor(keep)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("reweight", MODES)
@pytest.mark.parametrize(("seed", "threshold"), [(0, 0.02), (1, 0.02), (2, 1.0), (3, 1.0)])
def test_equals_one_swap_at_a_time(pattern, reweight, seed, threshold):
    arguments = problem(seed, pattern=pattern)
    how = Refinement(reweight=reweight, gamma_grow=0.05, gamma_prune=0.05, threshold=threshold)
    expected = one_at_a_time(*arguments, how, group_of(pattern))
    assert torch.equal(refine(*arguments, how, group_of(pattern)), expected)
    changed = (expected != arguments[1]).sum(1)
    assert changed.max() >= 4  # Some row needs more than one swap.


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("cycles", [0, 1, 2, 5])
def test_swaps_are_limited(pattern, cycles):
    """Wide rows with small weights need many swaps."""
    arguments = problem(3, rows=6, columns=96, pattern=pattern)
    how = Refinement(cycles=cycles, threshold=0.0)
    after = refine(*arguments, how, group_of(pattern))
    assert torch.equal(after, one_at_a_time(*arguments, how, group_of(pattern)))
    swaps = (after & ~arguments[1]).sum(1)
    assert swaps.max() == cycles


def test_the_modes_differ():
    arguments = problem(1, rows=40)
    found = [refine(*arguments, Refinement(reweight=mode)) for mode in MODES]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10**6),
    st.sampled_from(PATTERNS),
    st.sampled_from(MODES),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(1, 60),
    st.floats(0, 2),
)
def test_the_expected_error_never_increases_and_counts_stay(seed, pattern, reweight, dtype, cycles, threshold):
    weight, keep, mean, *rest = problem(seed, rows=5, columns=16, pattern=pattern, dtype=dtype)
    how = Refinement(cycles, threshold, reweight)
    after = refine(weight, keep, mean, *rest, how, group_of(pattern))
    before_error, after_error = (expected_error(weight, mask, mean).abs() for mask in (keep, after))
    # The sums of before and after round differently, if at all.
    assert (after_error <= before_error + 1e-12).all()
    changed = (after != keep).any(1)
    assert (after_error < before_error)[changed].all()
    group = group_of(pattern) or 16
    assert torch.equal(after.unflatten(1, (-1, group)).sum(-1), keep.unflatten(1, (-1, group)).sum(-1))
    assert not changed[before_error <= threshold].any()


def test_a_swap_whose_gain_is_lost_in_rounding_ends_the_row():
    """The first choice changes d = 5 by less than its last digit; the second would help, but is not reached."""
    weight, mean, variance = torch.zeros(3, 40, dtype=torch.float64)  # Most inputs are dead.
    weight[:4] = torch.tensor([5.0, 4e-16, -1e-20, -2])
    mean[:4] = 1
    variance[:4] = torch.tensor([100.0, 1e-15, 1, 1])
    keep = (weight < 0)[None]
    arguments = (weight[None], keep, mean, variance, mean, Refinement())
    assert torch.equal(one_at_a_time(*arguments), keep)
    assert torch.equal(refine(*arguments), keep)
    weight[1] = 0
    assert not torch.equal(refine(*arguments), keep)


def test_a_row_that_is_fine_is_left_alone_and_the_others_are_not():
    weight, keep, mean, variance, norm = problem(5)
    fine = expected_error(weight, keep, mean).abs() <= 1.0
    after = refine(weight, keep, mean, variance, norm, Refinement(threshold=1.0))
    assert 0 < fine.sum() < len(fine)
    assert torch.equal((after == keep).all(1), fine)


def test_ties_go_to_the_first_position_and_calls_agree():
    """Equal weights and inputs: everything is a tie."""
    weight = torch.tensor([[1.0, 1, 1, 1, 1, -1, -1, -1, -1, 1]]).repeat(7, 1)
    keep = torch.tensor([[False] * 5 + [True] * 5]).repeat(7, 1)
    ones = torch.ones(10)
    after = refine(weight, keep, ones, ones, ones, Refinement(cycles=2))
    expected = torch.tensor([[True, True, False, False, False, False, False, True, True, True]]).repeat(7, 1)
    assert torch.equal(after, expected)
    arguments = problem(8, rows=50, columns=64, dtype=torch.float32)
    assert torch.equal(refine(*arguments, Refinement()), refine(*arguments, Refinement()))


@pytest.mark.parametrize("reweight", MODES)
def test_dead_inputs_take_no_part(reweight):
    weight, keep, mean, variance, norm = problem(6, rows=30)
    mean[3] = variance[3] = norm[3] = 0
    how = Refinement(reweight=reweight, threshold=0.0)
    after = refine(weight, keep, mean, variance, norm, how)
    assert torch.equal(after[:, 3], keep[:, 3])
    assert torch.equal(after, one_at_a_time(weight, keep, mean, variance, norm, how))
    assert not torch.equal(after, keep)


@pytest.mark.parametrize("reweight", MODES)
def test_constant_inputs_come_first_by_their_effect(reweight):
    weight = torch.tensor([[1.0, 1, 1, 1, -1, -1, -1, -1]])
    mean = torch.tensor([1.0, 1, 0.3, 0.5, 0.1, 0.1, 0.1, 0.1])
    variance = torch.tensor([0.01, 0.1, 0, 0, 1, 1, 1, 1])
    keep = weight < 0
    for cycles, expected in ((1, {3}), (2, {3, 2}), (3, {3, 2, 0})):
        how = Refinement(cycles, reweight=reweight)
        revived = (refine(weight, keep, mean, variance, torch.ones(8), how) & ~keep)[0].nonzero().flatten()
        assert set(revived.tolist()) == expected


def test_statistics_of_nothing_change_nothing():
    weight, keep, *_ = problem(6)
    zeros = torch.zeros(24, dtype=torch.float64)
    for mode in MODES:
        assert torch.equal(refine(weight, keep, zeros, zeros, zeros, Refinement(reweight=mode, threshold=0.0)), keep)


@pytest.mark.parametrize("reweight", MODES)
def test_empty_rows_and_columns(reweight):
    """Nothing kept in a row: nothing to swap. Nothing kept in a column: a finite relative weight, as defined."""
    weight, keep, mean, variance, norm = problem(7)
    keep[2] = False
    keep[:, 5] = False
    how = Refinement(reweight=reweight, threshold=0.0)
    after = refine(weight, keep, mean, variance, norm, how)
    assert torch.equal(after, one_at_a_time(weight, keep, mean, variance, norm, how))
    assert not after[2].any()
    keep[:] = False
    assert torch.equal(refine(weight, keep, mean, variance, norm, how), keep)


def test_expected_error_is_that_of_the_mean_input():
    weight, keep, mean, *_ = problem(9)
    torch.testing.assert_close(expected_error(weight, keep, mean), weight @ mean - (weight * keep) @ mean)


def test_many_chunks_give_what_one_gives(monkeypatch):
    arguments = problem(10, rows=23)
    whole = refine(*arguments, Refinement(reweight="grow"))
    monkeypatch.setattr("llm_surgeon.mathematics.dsnot._AT_ONCE", 24 * 5)
    assert torch.equal(refine(*arguments, Refinement(reweight="grow")), whole)
    assert not torch.equal(whole, arguments[1])


def test_low_precision_is_read_as_float32():
    arguments = problem(11, dtype=torch.bfloat16)
    expected = refine(*(a.float() if a.is_floating_point() else a for a in arguments), Refinement())
    assert torch.equal(refine(*arguments, Refinement()), expected)
    assert not torch.equal(expected, arguments[1])


def test_a_group_that_does_not_fit_is_refused():
    with pytest.raises(RuntimeError):
        refine(*problem(0), Refinement(), group=5)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 1.0, 2.0, math.inf]), min_size=1, max_size=9), st.data())
def test_largest_against_sorting(values, data):
    count = data.draw(st.integers(0, len(values)))
    found, positions = _largest(torch.tensor([values, values[::-1]]), count)
    for row, value, position in zip((values, values[::-1]), found.tolist(), positions.tolist(), strict=True):
        expected = sorted(range(len(row)), key=lambda i: (-row[i], i))[:count]
        assert position == expected
        assert value == [row[i] for i in expected]
