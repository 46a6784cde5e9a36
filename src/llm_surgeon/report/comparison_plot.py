"""Picture of a comparison: the perplexity of every method, in a panel per setting."""

from __future__ import annotations

import math
from pathlib import Path

from llm_surgeon.records import Cell, Comparison
from llm_surgeon.report.card import model_name
from llm_surgeon.report.comparison_table import cells_by_setting
from llm_surgeon.report.plots import BLUE, VERMILION, Axes, Figure, FigureCanvasAgg, own_style, tick_perplexity
from llm_surgeon.report.table import perplexity_cell

_COLUMNS = 3
# Multiple of the best perplexity from which on a method is drawn at the edge, with its number: a method that destroys
# the model would press all others together.
_FAR = 30


@own_style()
def comparison_png(comparison: Comparison, path: Path) -> None:
    """Draw the perplexities of each setting as dots, the best method on top, with the dense model as a line.

    Args:
        comparison: The comparison; cells without numbers are left out.
        path: Path of the PNG file.
    """
    groups, dense = cells_by_setting(comparison), comparison.dense.perplexity.perplexity
    columns = max(1, min(_COLUMNS, len(groups)))
    rows = max(1, math.ceil(len(groups) / columns))
    most = max((len(cells) for _, cells in groups), default=1)
    # The object interface, as in plots.py.
    figure = Figure(figsize=(1 + 5.2 * columns, 0.6 + rows * (1.5 + 0.27 * most)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (setting, cells) in zip(panels, groups, strict=False):
        # The dense perplexity is in the title, where it meets no method's number.
        axes.set_title(f"{setting.label} (dashed: dense, {perplexity_cell(dense)})")
        draw_setting(axes, cells, dense)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    figure.suptitle(f"{model_name(comparison.model)}: perplexity by method", fontsize=14)
    figure.savefig(path, dpi=150, format="png")


def draw_setting(axes: Axes, cells: list[Cell], dense: float) -> None:
    """Draw one setting, or the words "not measured" if there is no number."""
    points = [(cell.measures.perplexity.perplexity, cell.variant) for cell in cells if cell.measures]
    if not points:
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    values, names = zip(*sorted(points, reverse=True), strict=True)
    limit = _FAR * values[-1]
    drawn, places = [min(value, limit) for value in values], range(len(values))
    axes.set_xscale("log")
    axes.axvline(dense, color=VERMILION, linestyle="--")
    for place, value, x in zip(places, values, drawn, strict=True):
        axes.plot(x, place, color=BLUE, marker="o" if value == x else ">", markersize=7, linestyle="none")
        axes.annotate(perplexity_cell(value), (x, place), (7, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, names, parse_math=False)
    axes.set_ylim(-0.7, len(values) - 0.3)
    _widen(axes, [*drawn, dense])
    tick_perplexity(axes.xaxis, [*drawn, dense])
    if values[0] > limit:
        axes.set_xlabel("perplexity (log scale; triangles are off the scale)")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)


def _widen(axes: Axes, values: list[float]) -> None:
    """Widen the axis on both sides, on the right also for the number of the worst method."""
    low, high = math.log10(min(values)), math.log10(max(values))
    span = max(high - low, 0.1)
    axes.set_xlim(10 ** (low - 0.06 * span), 10 ** (high + 0.34 * span))
