import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_surgeon.mathematics.updates import remove_columns, remove_rows
from oracles import constrained_minimum, fisher, random_factor, removed_mask


def complement(size, removed):
    mask = torch.ones(size, dtype=torch.bool)
    mask[removed] = False
    return mask.nonzero().flatten()


@st.composite
def problems(draw):
    rows, columns = draw(st.integers(2, 6)), draw(st.integers(2, 7))
    r = draw(st.sets(st.integers(0, rows - 1), max_size=rows - 1))
    c = draw(st.sets(st.integers(0, columns - 1), max_size=columns - 1))
    return (
        rows,
        columns,
        torch.tensor(sorted(r), dtype=torch.long),
        torch.tensor(sorted(c), dtype=torch.long),
        draw(st.integers(0, 1000)),
    )


@settings(deadline=None, max_examples=40)
@given(problems())
def test_rows_then_columns_is_the_exact_joint_minimiser(problem):
    rows, columns, r, c, seed = problem
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    a, g = random_factor(columns, generator), random_factor(rows, generator)
    damping_a, damping_g = 0.07, 0.3
    damped_a = a + damping_a * torch.eye(columns, dtype=torch.float64)
    damped_g = g + damping_g * torch.eye(rows, dtype=torch.float64)
    kept_rows, kept_columns = complement(rows, r), complement(columns, c)

    updated = remove_rows(weight, g, r, kept_rows, damping_g, "g")
    updated = remove_columns(updated, a, c, kept_columns, damping_a, "a")

    _, change = constrained_minimum(fisher(damped_a, damped_g), weight.flatten(), removed_mask(rows, columns, r, c))
    expected = (weight + change.view(rows, columns))[kept_rows][:, kept_columns]
    torch.testing.assert_close(updated, expected, rtol=1e-8, atol=1e-8)


def test_the_cost_of_a_removed_set_is_that_of_its_update():
    """1/2 d^T F d of the fast update equals the minimum of the dense problem."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    a, g = random_factor(7, generator), random_factor(5, generator)
    r, c = torch.tensor([1, 4]), torch.tensor([0, 2, 6])
    kept_rows, kept_columns = complement(5, r), complement(7, c)
    small = remove_columns(remove_rows(weight, g, r, kept_rows, 0.0, "g"), a, c, kept_columns, 0.0, "a")
    whole = torch.zeros_like(weight)
    whole[kept_rows[:, None], kept_columns] = small
    change = (whole - weight).flatten()
    minimum, _ = constrained_minimum(fisher(a, g), weight.flatten(), removed_mask(5, 7, r, c))
    assert float(0.5 * change @ fisher(a, g) @ change) == pytest.approx(minimum, rel=1e-8)


def test_adding_separate_updates_is_not_the_joint_solution():
    """The published code adds the row and the column update; the cross term it loses is real."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    a, g = random_factor(7, generator), random_factor(5, generator)
    r, c = torch.tensor([0, 1]), torch.tensor([2, 3])
    rows, columns = complement(5, r), complement(7, c)
    by_rows = remove_rows(weight, g, r, rows, 0.0, "g")
    joint = remove_columns(by_rows, a, c, columns, 0.0, "a")
    by_columns = remove_columns(weight, a, c, columns, 0.0, "a")
    added = by_rows[:, columns] + by_columns[rows] - weight[rows][:, columns]
    assert (joint - added).abs().max() > 1e-3


def test_what_died_by_implication_is_left_out_of_the_kept_block():
    """A row neither removed nor kept takes no part: the result is that of the problem without it."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    g = random_factor(5, generator)
    removed, kept = torch.tensor([1]), torch.tensor([0, 2, 4])
    without = torch.tensor([0, 1, 2, 4])
    expected = remove_rows(
        weight[without], g[without][:, without], torch.tensor([1]), torch.tensor([0, 2, 3]), 0.1, "g"
    )
    torch.testing.assert_close(remove_rows(weight, g, removed, kept, 0.1, "g"), expected)


def test_everything_removed_leaves_an_empty_matrix():
    weight, g = torch.randn(3, 4, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    nothing = torch.tensor([], dtype=torch.long)
    assert remove_rows(weight, g, torch.arange(3), nothing, 0.1, "g").shape == (0, 4)
