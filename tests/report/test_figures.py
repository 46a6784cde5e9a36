from __future__ import annotations

from itertools import pairwise

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from llm_surgeon.records import StageRecord
from llm_surgeon.report.figures import (
    PHASE_COLOURS,
    draw_costs,
    draw_loss,
    draw_memory,
    draw_times,
    evenly_spaced,
    inline_svg,
    loss_points,
    phases_of,
    power_of_ten,
)
from report.test_page import COSTS, Page, full_shot
from report.test_table import sample_report


def test_histogram_shows_counts_and_threshold() -> None:
    axes = Figure().subplots()
    draw_costs(axes, COSTS)
    kept, removed = (patch for patch in axes.patches if isinstance(patch, StepPatch))
    assert list(kept.get_data().values) == [0.5, 20, 300]  # an empty bin lies on the lower edge
    assert list(removed.get_data().values) == [100, 10, 0.5]
    assert list(kept.get_data().edges) == list(COSTS.exponents)
    (line,) = axes.lines
    assert line.get_xdata() == pytest.approx([-2.910, -2.910], abs=1e-3)
    assert axes.get_yscale() == "log"


def test_histogram_without_a_threshold_has_no_line() -> None:
    axes = Figure().subplots()
    draw_costs(axes, COSTS.model_copy(update={"threshold": 0.0}))
    assert not axes.lines


@pytest.mark.parametrize(
    ("number", "most", "expected"), [(0, 6, []), (3, 6, [0, 1, 2]), (7, 2, [0, 6]), (11, 6, [0, 2, 4, 6, 8, 10])]
)
def test_evenly_spaced(number: int, most: int, expected: list[int]) -> None:
    assert evenly_spaced(range(number), most) == expected


def test_loss_belongs_to_the_size_before_its_shot() -> None:
    shots = (full_shot(1, 0.75), full_shot(2, 0.5).model_copy(update={"loss": None}), full_shot(3, 0.25))
    report = sample_report(shots=shots)
    assert loss_points(report) == [(100.0, 3.0), (50.0, 3.0)]
    axes = Figure().subplots()
    draw_loss(axes, report)
    before, *fitted = axes.lines
    assert list(before.get_xdata()) == [100, 50]
    assert all(list(line.get_xdata()) == [75, 50, 25] for line in fitted)
    losses = {line.get_label(): set(line.get_ydata()) for line in fitted}
    assert losses == {
        "before gates": {3.4567}, "after gates": {3.3219}, "before correction": {3.456}, "after correction": {3.123},
    }  # fmt: skip


def test_bars_of_time_end_at_the_sum() -> None:
    figure = Figure()
    draw_times(figure, [full_shot(1, 0.75), full_shot(2, 0.5)])
    (axes,) = figure.axes
    assert len(axes.patches) == 2 * len(PHASE_COLOURS)
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == pytest.approx(61.5)
    assert [text.get_text() for text in axes.texts] == ["61.5", "61.5"]
    assert full_shot(1, 0.75).seconds == 56.5


def test_bars_of_memory_stand_side_by_side_with_the_floor() -> None:
    figure = Figure()
    peaks = {"curvature": 20, "evaluation": 30, "loading": 40}
    named = tuple(
        StageRecord(name=name, seconds=1.0, peak=peak, reports=name == "evaluation") for name, peak in peaks.items()
    )
    bare = StageRecord(name="curvature", seconds=1.0)
    shots = [full_shot(number, 0.5).model_copy(update={"stages": run}) for number, run in ((1, (bare,)), (2, named))]
    assert phases_of(shots) == ["curvature", "loading", "evaluation"]
    draw_memory(figure, shots, floor=10)
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [0, 20, 0, 40, 0, 30]
    assert list(axes.lines[0].get_ydata()) == [10, 10]
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(after[0] >= before[1] - 1e-9 for before, after in pairwise(edges))


@pytest.mark.parametrize(("exponent", "text"), [(-12.0, "10\u207b\u00b9\u00b2"), (3, "10\u00b3"), (0.5, "")])
def test_power_of_ten(exponent: float, text: str) -> None:
    assert power_of_ten(exponent) == text


def test_inline_svg_keeps_the_text_and_only_ids_in_use() -> None:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([1, 2], marker="o")
        axes.set_title('a <b> id="c" & $\\frac$')

    one, two = (inline_svg(name, 'a "label"', (3, 2), draw) for name in ("one", "two"))
    assert one.startswith('<svg role="img" aria-label="a &quot;label&quot;" ')
    assert one.endswith("</svg>")
    pages = Page(one), Page(two)
    assert 'a <b> id="c" & $\\frac$' in pages[0].text("text")
    first, second = (set(page.attributes("id")) for page in pages)
    assert first
    assert first.isdisjoint(second)
