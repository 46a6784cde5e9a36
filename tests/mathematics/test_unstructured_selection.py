import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.mathematics.unstructured_selection import (
    ElementMask,
    keep_highest,
    keep_in_scope,
    largest_threshold,
    select_elements,
)


def masks(*shapes):
    return {str(number): ElementMask(torch.ones(shape, dtype=torch.bool)) for number, shape in enumerate(shapes)}


def left(selection):
    return sum(mask.weights for mask in selection.keep.values())


@settings(deadline=None, max_examples=200)
@given(
    st.lists(
        st.lists(
            st.floats(0, 1e6, width=32, allow_subnormal=True) | st.sampled_from([0.0, -0.0, 1.0, 2.0]), max_size=8
        ),
        max_size=4,
    ),
    st.integers(0, 40),
)
def test_threshold_against_sorting(scores, removable):
    """Ties, zeros and denormals: at most ``removable`` go, and the next larger score would be too many."""
    flat = sorted(score for part in scores for score in part)
    found, count = largest_threshold([torch.tensor(part, dtype=torch.float32) for part in scores], removable)
    going = sum(score <= found for score in flat)
    assert going == count <= removable
    staying = [score for score in flat if score > found]
    if staying:
        assert sum(score <= staying[0] for score in flat) > removable


def test_the_cheapest_weights_of_all_layers_go():
    costs = {"0": torch.tensor([[1.0, 5.0], [0.5, 9.0]]), "1": torch.tensor([[2.0, 0.1, 7.0]])}
    selection = select_elements(masks((2, 2), (1, 3)), costs, target_weights=4)
    assert left(selection) == 4
    assert selection.keep["0"].elements.tolist() == [[False, True], [False, True]]
    assert selection.keep["1"].elements.tolist() == [[True, False, True]]
    assert selection.structures_chosen == 3
    assert selection.loss == pytest.approx(1.6)


def test_what_is_gone_stays_gone_and_is_not_counted_again():
    keep = {"0": ElementMask(torch.tensor([[False, True, True, True]]))}
    selection = select_elements(keep, {"0": torch.tensor([[0.0, 3.0, 1.0, 2.0]])}, target_weights=2)
    assert selection.keep["0"].elements.tolist() == [[False, True, False, True]]
    assert selection.structures_chosen == 1


def test_of_equal_costs_the_first_go_until_the_target_is_met():
    costs = {"0": torch.tensor([[1.0, 2.0, 2.0, 3.0]]), "1": torch.tensor([[2.0, 2.0, 0.5, 2.0]])}
    selection = select_elements(masks((1, 4), (1, 4)), costs, target_weights=3)
    assert selection.keep["0"].elements.tolist() == [[False, False, False, True]]
    assert selection.keep["1"].elements.tolist() == [[False, True, False, True]]
    assert selection.structures_chosen == 5


def test_zeros_go_first_however_many_there_are():
    """More than are to go: a model that is sparse already."""
    selection = select_elements(masks((2, 3)), {"0": torch.tensor([[0.0, -0.0, 4.0], [0.0, 0.0, 1.0]])}, 4)
    assert selection.keep["0"].elements.tolist() == [[False, False, True], [True, True, True]]
    assert selection.loss == 0.0


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 5), (1, 4)]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 99),
    st.integers(1, 4),
)
def test_patterns_hold_in_every_group_after_all_shots(pattern, rows, groups, seed, shots):
    kept, group = pattern
    generator = torch.Generator().manual_seed(seed)
    keep = masks((rows, groups * group), (rows + 1, group))
    dense = sum(mask.weights for mask in keep.values())
    for shot in range(1, shots + 1):
        # Few different values: many ties.
        costs = {
            name: torch.randint(3, mask.elements.shape, generator=generator).float() * mask.elements
            for name, mask in keep.items()
        }
        target = round(dense * (1 - (1 - kept / group) * shot / shots))
        before, keep = keep, select_elements(keep, costs, target, Pattern(kept, group)).keep
        for name, mask in keep.items():
            assert not (mask.elements & ~before[name].elements).any()
            counts = mask.elements.view(len(mask.elements), -1, group).sum(-1)
            assert ((counts == group) | (counts == kept)).all()
        left_over = sum(mask.weights for mask in keep.values()) - target
        assert 0 <= left_over < group - kept
    for mask in keep.values():
        assert (mask.elements.view(len(mask.elements), -1, group).sum(-1) == kept).all()


def test_a_group_loses_its_cheapest_weights():
    costs = {"0": torch.tensor([[4.0, 1.0, 3.0, 2.0, 9.0, 8.0, 7.0, 6.0]])}
    selection = select_elements(masks((1, 8)), costs, target_weights=6, pattern=Pattern(2, 4))
    assert selection.keep["0"].elements.tolist() == [[True, False, True, False, True, True, True, True]]
    assert selection.threshold >= 3.0


@given(
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(0, 3),
    st.integers(0, 1000),
    st.data(),
)
def test_the_lowest_of_each_row_go_and_the_first_of_equal_ones(rows, columns, levels, seed, data):
    removed = data.draw(st.integers(0, columns))
    # Few levels make ties.
    scores = torch.randint(levels + 1, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    kept = keep_highest(scores, removed)
    for row, mask in zip(scores.tolist(), kept.tolist(), strict=True):
        order = sorted(range(columns), key=lambda c: (row[c], c))
        assert [c for c in range(columns) if not mask[c]] == sorted(order[:removed])


def test_scopes_compare_within_rows_the_layer_or_groups():
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert keep_in_scope(scores, 0.5, True, None).tolist() == [[False, False, True, True]] * 2
    assert keep_in_scope(scores, 0.5, False, None).tolist() == [[False] * 4, [True] * 4]
    assert keep_in_scope(scores.flip(1), 0.9, True, Pattern(1, 2)).tolist() == [[True, False, True, False]] * 2
