"""Pictures of a run, and the import of matplotlib for all modules of the report, see ``undisturbed``."""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llm_surgeon.records import LayerRecord, PruneReport
from llm_surgeon.report.card import model_name
from llm_surgeon.report.labels import write_values
from llm_surgeon.report.table import perplexity_cell, scaled

_BACKEND, _SETTINGS = "MPLBACKEND", "MATPLOTLIBRC"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Import matplotlib without errors or warnings about things that only windows need.

    Such things are a backend that is not installed, a file of settings that cannot be read, and a directory for
    settings that cannot be written: the report uses only ``Figure`` and the Agg canvas. Other code in this process
    still has the user's backend and settings, if they are possible.
    """
    logger = logging.getLogger("matplotlib")
    level, backend = logger.level, os.environ.pop(_BACKEND, None)
    first = "matplotlib" not in sys.modules
    logger.setLevel(logging.ERROR)
    try:
        try:
            matplotlib = importlib.import_module("matplotlib")
        except (OSError, ValueError):  # a file of settings that cannot be read, or is no text
            with _without_settings():
                matplotlib = importlib.import_module("matplotlib")
        # The backend has no effect until some code asks for a window.
        if first and backend:
            with contextlib.suppress(ValueError):
                matplotlib.rcParams["backend"] = backend
        yield
    finally:
        logger.setLevel(level)
        if backend is not None:
            os.environ[_BACKEND] = backend


@contextlib.contextmanager
def _without_settings() -> Iterator[None]:
    """Hide all files of settings from matplotlib, in the working directory and in the directory of ``MATPLOTLIBRC``."""
    # Modules of the first attempt hold the module that failed.
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        del sys.modules[name]
    former = os.environ.get(_SETTINGS)
    os.environ[_SETTINGS] = os.devnull
    try:
        with contextlib.chdir(Path(__file__).parent):
            yield
    finally:
        os.environ.pop(_SETTINGS)
        if former is not None:
            os.environ[_SETTINGS] = former


# "as" makes these names of this module, so that other modules can import them.
with undisturbed():
    import matplotlib as mpl
    from matplotlib.axes import Axes as Axes
    from matplotlib.axis import Axis as Axis
    from matplotlib.backends.backend_agg import FigureCanvasAgg as FigureCanvasAgg
    from matplotlib.figure import Figure as Figure
    from matplotlib.ticker import EngFormatter as EngFormatter
    from matplotlib.ticker import FuncFormatter as FuncFormatter
    from matplotlib.ticker import LogLocator as LogLocator
    from matplotlib.ticker import MaxNLocator as MaxNLocator
    from matplotlib.ticker import NullLocator as NullLocator

# Colours of the palette by Okabe and Ito, which colour-blind readers can tell apart; viridis is safe as it is.
BLUE = "#0072B2"
VERMILION = "#D55E00"
GRID = "#e6e6e6"
# Colour of layers that a block does not have.
ABSENT = "#d9d9d9"
# Perplexities that differ by less than this factor do not fill the axis.
_LEAST_SPAN = 1.1


@contextlib.contextmanager
def own_style(changes: Mapping[Any, Any] = MappingProxyType({})) -> Iterator[None]:
    """Draw in matplotlib's default style, as the user's may need LaTeX, or fonts that are not installed.

    Args:
        changes: Settings that differ from the default style. Keys have the type Any, as matplotlib's own type differs
            between its versions.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(changes)
        yield


@own_style()
def kept_fraction_png(report: PruneReport, path: Path) -> None:
    """Draw the kept fraction of each layer, by depth and kind (paper, Fig. 4), beside perplexity against size.

    Args:
        report: Report of the run.
        path: Path of the PNG file.
    """
    # The object interface: pyplot would keep every figure in a global list and pick a backend for the process.
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    layers, perplexities = figure.subplots(1, 2, width_ratios=(1.7, 1))
    draw_kept(figure, layers, report.layers)
    draw_perplexity(perplexities, report)
    figure.suptitle(_title(report), fontsize=14)
    figure.savefig(path, dpi=150, format="png")


def _title(report: PruneReport) -> str:
    dense = report.dense_size.prunable
    kept = report.shots[-1].size.prunable if report.shots else dense
    share = f"{100 * kept / dense:.1f} %"
    return f"{model_name(report.model)}: {scaled(kept)} of {scaled(dense)} prunable weights kept ({share})"


def kept_by_kind(layers: tuple[LayerRecord, ...]) -> tuple[list[str], np.ndarray]:
    """Kept fraction of the weights as a matrix of kinds by blocks.

    Several layers of one kind in a block (experts) count together. The fraction is NaN if a block has no such layer.

    Returns:
        The kinds in the order in which a block has them, and one row of fractions per kind.
    """
    kinds = list(dict.fromkeys(layer.kind for layer in layers))
    shape = (len(kinds), 1 + max(layer.block for layer in layers))
    kept, dense = np.zeros(shape), np.zeros(shape)
    for layer in layers:
        cell = kinds.index(layer.kind), layer.block
        kept[cell] += layer.weights
        dense[cell] += layer.weights_dense
    return kinds, np.divide(kept, dense, out=np.full(shape, np.nan), where=dense > 0)


def draw_kept(figure: Figure, axes: Axes, layers: tuple[LayerRecord, ...]) -> None:
    """Draw the kept fraction of the weights as a map of kinds by blocks, with its colour bar."""
    kinds, kept = kept_by_kind(layers)
    axes.set_facecolor(ABSENT)  # shows through where a block has no layer of the kind
    image = axes.imshow(100 * kept, vmin=0, vmax=100, cmap="viridis", aspect="auto", interpolation="none")
    axes.set_yticks(range(len(kinds)), kinds, parse_math=False)
    blocks = kept.shape[1]
    axes.set_xticks(range(0, blocks, math.ceil(blocks / 16)))
    # White lines between the cells: neighbours of nearly the same colour stay countable.
    axes.set_xticks(np.arange(blocks + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(len(kinds) + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.set_xlabel("block")
    axes.set_title("Weights kept in each layer")
    figure.colorbar(image, ax=axes, label="kept (%)", pad=0.015)


def perplexity_points(report: PruneReport) -> list[tuple[float, float]]:
    """Pairs of size kept in per cent and perplexity, dense model first; only perplexities that are known and finite."""
    measured = [report.dense_perplexity, *(shot.perplexity for shot in report.shots)]
    return [
        (kept, perplexity.perplexity)
        for kept, perplexity in zip(kept_percent(report), measured, strict=True)
        if perplexity is not None and math.isfinite(perplexity.perplexity)
    ]


def has_dense(report: PruneReport) -> bool:
    """Whether the first of ``perplexity_points`` is the dense model's."""
    return report.dense_perplexity is not None and math.isfinite(report.dense_perplexity.perplexity)


def draw_perplexity(axes: Axes, report: PruneReport) -> None:
    """Draw perplexity against the size kept, dense model first; as bars if there is only one point after pruning."""
    points, dense = perplexity_points(report), has_dense(report)
    if not points:
        axes.set_title("Perplexity after each shot")
        axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    if len(points) - dense < 2:
        _draw_bars(axes, points, dense)
        return
    axes.set_title("Perplexity after each shot")
    axes.plot(*zip(*points, strict=True), color=BLUE, marker="o", linewidth=2, label="pruned")
    if dense:
        axes.plot(*points[0], color=VERMILION, marker="D", markersize=9, linestyle="none", label="dense")
    axes.set_yscale("log")
    values = [perplexity for _, perplexity in points]
    finish_size_axes(axes)
    # A curve that is nearly flat has to look flat, so its last digits must not fill the axis.
    low, high = min(values), max(values)
    if high < _LEAST_SPAN * low:
        middle = math.sqrt(low * high)
        axes.set_ylim(middle / _LEAST_SPAN, middle * _LEAST_SPAN)
    tick_perplexity(axes.yaxis, values)
    write_values(axes, points)


def _draw_bars(axes: Axes, points: list[tuple[float, float]], dense: bool) -> None:
    """Draw the perplexities of one shot as bars, as two points make no curve."""
    names = ["dense", "pruned"] if dense else ["pruned"]
    values = [perplexity for _, perplexity in points]
    colours = [VERMILION, BLUE] if dense else [BLUE]
    bars = axes.bar(names[: len(points)], values, 0.55, color=colours[: len(points)])
    axes.bar_label(bars, [perplexity_cell(value) for value in values], padding=3)
    axes.margins(x=0.25, y=0.12)
    axes.set_title("Perplexity" if len(points) == 1 else "Perplexity before and after")
    axes.set_ylabel("perplexity")
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def tick_perplexity(axis: Axis, values: list[float]) -> None:
    """Label a logarithmic axis of perplexities legibly, whether it spans a factor of 2 or of 10^6."""
    # Powers of ten alone would leave an axis of a few decades nearly without labels.
    spread = max(values) / min(values)
    subs = next((subs for limit, subs in ((12, (1, 2, 3, 5, 7)), (1000, (1, 2, 5))) if spread < limit), (1,))
    axis.set_major_locator(MaxNLocator(7) if spread < 3 else LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_label_text("perplexity (log scale)")


def finish_size_axes(axes: Axes) -> None:
    """Finish the axes of a curve against size: direction from dense to small, grid, and legend below."""
    axes.margins(x=0.12, y=0.2)  # room for the numbers
    axes.invert_xaxis()  # a run goes from left to right
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.set_xlabel("prunable weights kept (%)")
    # Inside the axes, the legend would cover a falling or a rising curve.
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False)


def kept_percent(report: PruneReport) -> list[float]:
    """Shares of the prunable weights that are kept, in per cent: of the dense model, then after each shot."""
    sizes = [report.dense_size, *(shot.size for shot in report.shots)]
    return [100 * size.prunable / report.dense_size.prunable for size in sizes]
