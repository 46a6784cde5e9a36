"""Pictures of the run page, as SVG inside HTML."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, Literal, TypeVar

import numpy as np

from llm_surgeon.records import CostHistogram, LayerRecord, PruneReport, ShotRecord
from llm_surgeon.report.labels import write_values
from llm_surgeon.report.plots import (
    ABSENT,
    BLUE,
    GRID,
    VERMILION,
    Axes,
    Axis,
    EngFormatter,
    Figure,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    draw_kept,
    draw_perplexity,
    finish_size_axes,
    has_dense,
    kept_by_kind,
    kept_percent,
    own_style,
    perplexity_points,
)
from llm_surgeon.report.table import scaled_bytes

# More of the palette by Okabe and Ito, as in plots.py.
GREEN = "#009E73"
ORANGE = "#E69F00"
SKY = "#56B4E9"
PINK = "#CC79A7"
YELLOW = "#F0E442"
GREY = "#8c8c8c"
INK, GROUND = "#1b1f24", "#ffffff"
PHASE_COLOURS = {
    "curvature": BLUE,
    "selection": ORANGE,
    "update": GREEN,
    "reconstruction": PINK,
    "gates": YELLOW,
    "correction": SKY,
    "evaluation": VERMILION,
}
# Largest number of histograms, and of bars that get their numbers.
PANELS = 6
NUMBERED = 24

# Width in inches: with 72 points per inch and 4/3 pixels per point, it fills the column of the page.
WIDTH = 11.0
# Text stays text, which is small, can be searched, and has the page's own font.
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 11.0,
    "text.parse_math": False,
    # No background, and no black: the page has its own colours, light or dark.
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
# Names of the colours in the style sheet, which has other colours for a dark background.
VARIABLES = {
    INK: "currentColor",
    GROUND: "var(--ground)",
    GRID: "var(--grid)",
    ABSENT: "var(--absent)",
    BLUE: "var(--blue)",
    VERMILION: "var(--vermilion)",
    GREEN: "var(--green)",
    ORANGE: "var(--orange)",
    SKY: "var(--sky)",
    PINK: "var(--pink)",
    YELLOW: "var(--yellow)",
    GREY: "var(--grey)",
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")

T = TypeVar("T")


def curves_svg(report: PruneReport) -> str | None:
    """Draw perplexity and calibration loss against the size kept, each if it has two points; None if neither has."""
    panels: list[Callable[[Axes, PruneReport], None]] = []
    if len(perplexity_points(report)) - has_dense(report) > 1:
        panels.append(draw_perplexity)
    if len(loss_points(report)) > 1:
        panels.append(draw_loss)
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            panel(axes, report)

    width = WIDTH if len(panels) == 2 else 0.6 * WIDTH
    return inline_svg("curves", "Line charts: perplexity and calibration loss by size kept", (width, 4.0), draw)


def kept_svg(layers: tuple[LayerRecord, ...]) -> str | None:
    """Draw the kept fraction of each layer, by depth and kind; None without layers."""
    if not layers:
        return None
    kinds, _ = kept_by_kind(layers)
    size = (WIDTH, 1.2 + 0.32 * len(kinds))
    label = "Heat map: share of the weights kept in each layer, by block and kind"
    return inline_svg("kept", label, size, lambda figure: draw_kept(figure, figure.subplots(), layers))


def costs_svg(shots: Sequence[ShotRecord]) -> str | None:
    """Draw the distribution of the costs in each of the shots; None if no shot recorded it."""
    panels = [(shot.shot, shot.costs) for shot in shots if shot.costs is not None]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (number, costs) in zip(grid.flat, panels, strict=False):
            draw_costs(axes, costs)
            axes.set_title(f"shot {number}: threshold {costs.threshold:.3g}")
            axes.tick_params(labelbottom=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        # One legend for all panels; a panel without a threshold lacks that line.
        pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in grid.flat]
        handles = {name: handle for pair in pairs for handle, name in pair}
        figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles), frameon=False)
        figure.supxlabel(f"{panels[0][1].score} (log scale)", fontsize=10)
        figure.supylabel("candidates (log scale)", fontsize=10)

    label = "Histograms: candidates kept and removed by cost in each shot, with the threshold"
    return inline_svg("costs", label, (WIDTH, 0.9 + 2.3 * rows), draw)


def times_svg(shots: Sequence[ShotRecord]) -> str | None:
    """Draw the seconds of each phase of each shot; None without shots."""
    if not shots:
        return None
    size = (WIDTH, min(1.3 + 0.34 * len(shots), 10))
    label = "Stacked bars: seconds of each phase, by shot"
    return inline_svg("times", label, size, lambda figure: draw_times(figure, shots))


def memory_svg(shots: Sequence[ShotRecord], floor: int) -> str | None:
    """Draw the peak memory of each phase of each shot above the floor of the run; None if no peak was recorded."""
    if not any(shot.peak for shot in shots):
        return None
    label = "Bars: peak memory of each phase, by shot, with the floor of the run as a line"
    return inline_svg("memory", label, (WIDTH, 3.4), lambda figure: draw_memory(figure, shots, floor))


def phases_of(shots: Sequence[ShotRecord]) -> list[str]:
    """Names of all stages of the shots: in the order in which they run, the evaluation last."""
    stages = [stage for shot in shots for stage in shot.stages]
    return list(dict.fromkeys(stage.name for stage in sorted(stages, key=lambda stage: stage.reports)))


def phase_colour(phase: str) -> str:
    """Colour of a stage; grey if the stage has no colour of its own."""
    return PHASE_COLOURS.get(phase, GREY)


def stage_losses(shot: ShotRecord) -> dict[str, tuple[float, float]]:
    """First and last loss of each stage that reports at least two losses, by the stage's name."""
    found = {}
    for stage in shot.stages:
        losses = [figure.value for figure in stage.figures if figure.kind == "loss" and figure.value is not None]
        if len(losses) > 1:
            found[stage.name] = losses[0], losses[-1]
    return found


def evenly_spaced(items: Sequence[T], most: int) -> list[T]:
    """Choose at most ``most`` items (two or more): the first, the last, and evenly spaced items between them."""
    if len(items) <= most:
        return list(items)
    return [items[round(number * (len(items) - 1) / (most - 1))] for number in range(most)]


def loss_points(report: PruneReport) -> list[tuple[float, float]]:
    """Pair the size before each shot with the calibration loss that its curvature pass measured there."""
    before = kept_percent(report)[:-1]
    return [
        (kept, shot.loss)
        for kept, shot in zip(before, report.shots, strict=True)
        if shot.loss is not None and math.isfinite(shot.loss)
    ]


def draw_loss(axes: Axes, report: PruneReport) -> None:
    """Draw the calibration loss before each shot, and the losses before and after stages that report them."""
    points, others = loss_points(report), []
    axes.set_title("Calibration loss before each shot")
    axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", linewidth=2, label="before the shot")
    sizes = kept_percent(report)[1:]
    for number, stage in enumerate(dict.fromkeys(name for shot in report.shots for name in stage_losses(shot))):
        losses = [stage_losses(shot).get(stage, (math.nan, math.nan)) for shot in report.shots]
        for marker, label, values in zip("Ds", ("before", "after"), zip(*losses, strict=True), strict=True):
            colour = (VERMILION, GREEN)[label == "after"] if not number else phase_colour(stage)
            axes.plot(sizes, values, color=colour, marker=marker, linestyle="none", label=f"{label} {stage}")
            others += [point for point in zip(sizes, values, strict=True) if math.isfinite(point[1])]
    axes.set_ylabel("loss (nats per token)")
    finish_size_axes(axes)
    write_values(axes, points, others)


def draw_costs(axes: Axes, costs: CostHistogram) -> None:
    """Draw one histogram over powers of ten, removed in front of kept, and the threshold as a vertical line."""
    # The lower edge is half a candidate, as zero has no place on a logarithmic axis.
    edge = 0.5
    for counts, colour, label in ((costs.kept, BLUE, "kept"), (costs.removed, VERMILION, "removed")):
        heights = np.maximum(np.asarray(counts, dtype=float), edge)
        steps = axes.stairs(heights, costs.exponents, baseline=edge, fill=True, linewidth=1, label=label)
        steps.set(facecolor=(colour, 0.45), edgecolor=colour)
    if costs.threshold > 0 and math.isfinite(costs.threshold):
        axes.axvline(math.log10(costs.threshold), color=INK, linestyle="--", linewidth=1.2, label="threshold")
    axes.set_yscale("log")
    axes.set_ylim(bottom=edge)
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value)))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)


def draw_times(figure: Figure, shots: Sequence[ShotRecord]) -> None:
    """Draw one bar per shot, the seconds of its phases end to end, with their sum behind it."""
    axes = figure.subplots()
    positions = np.arange(len(shots))
    ends = np.zeros(len(shots))
    for phase in phases_of(shots):
        seconds = np.array([shot.seconds_of(phase) for shot in shots])
        if seconds.any():
            axes.barh(
                positions, seconds, left=ends, color=phase_colour(phase), edgecolor=GROUND, linewidth=0.6, label=phase
            )
        ends += seconds
    if len(shots) <= NUMBERED:
        for position, end in zip(positions, ends, strict=True):
            axes.annotate(f"{end:,.1f}", (end, position), (4, 0), textcoords="offset points", va="center")
    _number_shots(axes.yaxis, shots)
    axes.set_ylim(len(shots) - 0.4, -0.6)  # the first shot on top
    axes.margins(x=0.07)
    axes.set_xlabel("seconds")
    _finish_bars(figure, axes, "x")


def draw_memory(figure: Figure, shots: Sequence[ShotRecord], floor: int) -> None:
    """Draw a group of bars per shot, one for each phase with a recorded peak, and the floor as a line."""
    axes = figure.subplots()
    phases = phases_of(shots)
    width = 0.8 / len(phases)
    for number, phase in enumerate(phases):
        positions = np.arange(len(shots)) + (number - (len(phases) - 1) / 2) * width
        peaks = [stage.peak if (stage := shot.stage(phase)) else 0 for shot in shots]
        axes.bar(positions, peaks, width, color=phase_colour(phase), edgecolor=GROUND, label=phase)
    if floor > 0:
        axes.axhline(floor, color=INK, linestyle="--", linewidth=1.2, label=f"floor ({scaled_bytes(floor)})")
    _number_shots(axes.xaxis, shots)
    axes.set_xlim(-0.6, len(shots) - 0.4)
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.set_ylabel("peak memory")
    _finish_bars(figure, axes, "y")


def _number_shots(axis: Axis, shots: Sequence[ShotRecord]) -> None:
    """Write the shots' numbers at their bars; if there is little room, only every second, third, and so on."""
    step = math.ceil(len(shots) / NUMBERED)
    axis.set_ticks(range(0, len(shots), step), [str(shot.shot) for shot in shots[::step]])
    axis.set_label_text("shot")


def _finish_bars(figure: Figure, axes: Axes, values: Literal["x", "y"]) -> None:
    axes.grid(axis=values, color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper left", ncols=7, frameon=False)


def power_of_ten(exponent: float) -> str:
    """Write a power of ten with a raised exponent; empty unless the exponent is whole."""
    return f"10{str(round(exponent)).translate(_SUPERSCRIPTS)}" if exponent == round(exponent) else ""


def inline_svg(name: str, label: str, size: tuple[float, float], draw: Callable[[Figure], None]) -> str:
    """Draw a figure as an SVG element for an HTML document: the same bytes each time, and no clash of ids.

    Args:
        name: Name of the figure, unique in the document.
        label: Description of the picture, for readers who cannot see it.
        size: Width and height in inches.
        draw: Function that draws on the empty figure.
    """
    stream = io.StringIO()
    # The settings have to hold while drawing, when matplotlib decides whether dollar signs in text are mathematics.
    with own_style({**STYLE, "svg.hashsalt": name}):
        # The object interface, as in plots.py.
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(stream, format="svg")
    text = stream.getvalue()
    svg = text[text.index("<svg") :].strip()
    # The metadata has a date. The style rule would hold for the whole document, which has a style sheet of its own.
    for part in (r"<metadata>.*?</metadata>", r"<defs>\s*<style[^>]*>.*?</style>\s*</defs>", r"<!--.*?-->"):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    svg = re.sub(r">\s*\n\s*<", "><", _without_idle_ids(svg))
    for colour, variable in VARIABLES.items():
        svg = re.sub(rf"(?<=: ){colour.lower()}(?![0-9a-f])", variable, svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)


def _without_idle_ids(svg: str) -> str:
    """Drop ids that nothing refers to, as they would clash: matplotlib numbers groups alike in every figure."""
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    return re.sub(r'(<[a-zA-Z][^<>]*?) id="([^"]*)"', lambda tag: tag[0] if tag[2] in used else tag[1], svg)
