"""The table and the picture of the frontier benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from common import COLOURS, figure, table
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

PARTS = ("prefill", "decode")
# Perplexities above this multiple of the best one are of no use, and would leave no room for the others.
WORST = 4.0
# Ticks of a decade.
STEPS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
# Load above the measured threads that an idle machine has now and then.
OTHERS = 0.25


def rows_of(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make a row of each cell; says which rows no other beats in perplexity and bytes, or perplexity and prefill.

    The rate of a pruned file is that of the dense file of its type, among all dense files in turn, times the ratio of
    the two, which are measured in turn as well: so a change of the machine's load between cells is in neither.

    Args:
        cells: Measures of one model and type each, see ``frontier.report``.
    """
    timed = [cell for cell in cells if cell["speed"]]
    dense = {cell["type"]: cell["speed"]["samples"]["dense"] for cell in timed if not cell["structure"]}
    rows = [_row(cell) | _speeds(cell["speed"], dense.get(cell["type"])) for cell in cells]
    for name, key in (("size", "bytes"), ("prefill", "prefill_ms")):
        known = [row for row in rows if row[key] is not None]
        for number in unbeaten([(row[key], row["perplexity"]) for row in known]):
            known[number]["best"].append(name)
    return rows


def _row(cell: dict[str, Any]) -> dict[str, Any]:
    facts = cell["file"]
    row = {name: cell[name] for name in ("model", "structure", "uniform", "asked", "removed", "type")}
    row |= {name: facts[name] for name in ("bytes", "parameters", "fallbacks", "kinds", "cache_bytes")}
    row |= {"tensors": sum(facts["types"].values()), **cell["perplexity"], "best": []}
    return row


def _speeds(speed: dict[str, Any] | None, dense: dict[str, list[float]] | None) -> dict[str, Any]:
    """Speeds of a row; None where they were not measured."""
    known = speed is not None and dense is not None
    found: dict[str, Any] = {"load": speed["load"] if known else None, "loaded": known and loaded(speed)}
    for part in PARTS:
        own = speed["samples"].get("pruned") if known else None
        times = ratio(speed["samples"]["dense"][part], own[part]) if own else 1.0
        found[f"{part}_ratio"] = times if known else None
        found[f"{part}_ms"] = median(dense[part]) / times if known else None
    return found


def loaded(speed: dict[str, Any]) -> bool:
    """Whether other work was on the machine: the measured threads alone make a load of their number."""
    return bool(speed["load"] > speed["threads"] + OTHERS)


def ratio(dense: Sequence[float], pruned: Sequence[float]) -> float:
    """Times that the pruned model is as fast as the dense one: median over rounds, each with a sample of both."""
    return median(slow / fast for slow, fast in zip(dense, pruned, strict=True))


def unbeaten(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points that no other point is at most as large as in both values, and smaller in one."""

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    return [number for number, point in enumerate(points) if not any(beats(other, point) for other in points)]


def label(row: dict[str, Any]) -> str:
    """Name of a model in the table."""
    if not row["structure"]:
        return "dense"
    return f"{row['structure']}{' uniform' if row['uniform'] else ''}, {100 * row['removed']:.1f} % removed"


def markdown(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows, settings = result["rows"], result["settings"]
    lines = [
        (
            label(row),
            row["type"],
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['fallbacks']} of {row['tensors']}",
            f"{row['perplexity']:.2f}",
            *speeds(row),
            None if row["cache_bytes"] is None else f"{row['cache_bytes'] * settings['cache_tokens'] / 1e6:.1f} MB",
            " and ".join(row["best"]) or None,
        )
        for row in rows
    ]
    heading = ("model", "type", "file", "fallbacks", "perplexity", "prefill, tokens/s", "against dense")
    heading += ("decoding, tokens/s", "against dense", "key/value cache", "unbeaten in")
    return (
        f"# Pruning beside quantisation: {settings['model'].rstrip('/').rpartition('/')[2]}\n\n"
        f"llama.cpp {result['llama.cpp']}. {result['date']}, {result['machine']}; {result['threads']} threads.\n"
        f"Command: `{result['command']}`\n\n{table(heading, lines)}\n\n{notes(result)}"
    )


def speeds(row: dict[str, Any]) -> list[str | None]:
    """Rates and ratios of a row in the table; a star is of a loaded machine."""
    if row["prefill_ms"] is None:
        return [None] * (2 * len(PARTS))
    star = "*" if row["loaded"] else ""
    said: list[str | None] = []
    for part, digits in zip(PARTS, (0, 1), strict=True):
        said += [f"{1000 / row[f'{part}_ms']:,.{digits}f}{star}", f"{row[f'{part}_ratio']:.2f}"]
    return said


def notes(result: dict[str, Any]) -> str:
    """Explanations below the table."""
    rows, settings = result["rows"], result["settings"]
    lines = [
        "Removed: share of the linear weights of the blocks. Nothing is retrained; types are made by llama-quantize "
        "without an importance matrix, from float16.",
        f"Perplexity: llama-perplexity on the first {settings['chunks']} windows of {settings['context']} tokens of "
        f"{settings['text']}, of the second half of each window. Its standard error is "
        f"{max(100 * row['error'] / row['perplexity'] for row in rows):.1f} % at most. All rows have the same text, so "
        "that differences between them are surer than that.",
        f"Prefill of 512 tokens, decoding of 64: medians of {settings['repeats']} rounds. Dense files are measured in "
        "turn, and each pruned file in turn with the dense file of its type; its rate is the dense one's in the table "
        "times their ratio.",
        f"Key/value cache: for {settings['cache_tokens']:,} tokens in 16 bits.",
        "Unbeaten in size or prefill: no other row has both a smaller file, or a faster prefill, and a perplexity as "
        "good.",
    ]
    lines += fallback_notes(rows)
    if any(row["loaded"] for row in rows):
        highest = max(row["load"] for row in rows if row["load"] is not None)
        lines.append(
            f"\\* The machine was loaded: the mean load of a minute was {highest:.1f} at most, of which the measured "
            f"threads are {result['threads']}. Rates are too low; ratios suffer less, as both models had the same load."
        )
    if result["missing"]:
        lines.append(f"Unfinished: {result['missing']} rows are missing.")
    return "".join(f"- {line}\n" for line in lines)


def fallback_notes(rows: Iterable[dict[str, Any]]) -> list[str]:
    """A note of what the types of the dense model fell back to."""
    said = [
        f"{row['type']} " + ", ".join(f"{count} x {kind}" for kind, count in sorted(row["kinds"].items()))
        for row in rows
        if not row["structure"] and row["fallbacks"]
    ]
    if not said:
        return []
    return [
        "Fallbacks: tensors whose columns are no multiple of the type's block (256 for K-quants, else 32) get a larger "
        f"type. In the dense files: {'; '.join(said)}."
    ]


def draw(result: dict[str, Any]) -> Figure:
    """Draw perplexity against bytes with a line for each model; if timed, against prefill with a line for each type."""
    best = min(row["perplexity"] for row in result["rows"])
    rows = [row for row in result["rows"] if row["perplexity"] <= WORST * best]
    timed = [row for row in rows if row["prefill_ms"] is not None]
    picture = figure(10.0 if timed else 6.0, 4.6)
    panels = picture.subplots(1, 2 if timed else 1, sharey=True, squeeze=False)[0]
    _draw_sizes(panels[0], rows)
    if timed:
        _draw_speeds(panels[1], timed)
    panels[0].set_ylabel("perplexity")
    for axes in panels:
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(visible=True, which="both", linewidth=0.3)
        axes.margins(x=0.18)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=STEPS, numticks=20))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="both", labelsize="small")
    return picture


def _draw_sizes(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Lines of the models through their types."""
    shares = sorted({row["asked"] for row in rows})
    for name in dict.fromkeys(row["model"] for row in rows):
        line = sorted((row for row in rows if row["model"] == name), key=lambda row: row["bytes"])
        first = line[0]
        colour = "black" if not first["structure"] else COLOURS[(shares.index(first["asked"]) - 1) % len(COLOURS)]
        sizes, values = [row["bytes"] / 1e6 for row in line], [row["perplexity"] for row in line]
        axes.plot(sizes, values, _style(first), color=colour, markersize=3.5, linewidth=1.2)
        end = "dense" if not first["structure"] else f"{100 * first['asked']:.0f} %"
        _beside(axes, end, (sizes[-1], values[-1]), colour)
        if not first["structure"]:
            for row, size, value in zip(line, sizes, values, strict=True):
                _beside(axes, row["type"], (size, value), colour, left=True)
    axes.set_xlabel("MB of the file")
    axes.set_title("size: a line for each model, types along it", fontsize="medium")
    _say_widths(axes, rows)


def _draw_speeds(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Lines of the types through the sparsities."""
    kinds = list(dict.fromkeys(row["type"] for row in rows))
    for number, kind in enumerate(kinds):
        colour = COLOURS[number % len(COLOURS)]
        dense = [row for row in rows if row["type"] == kind and not row["structure"]]
        pruned = [row for row in rows if row["type"] == kind and row["structure"]]
        for group in dict.fromkeys((row["structure"], row["uniform"]) for row in pruned) or [("", False)]:
            line = dense + [row for row in pruned if (row["structure"], row["uniform"]) == group]
            axes.plot(
                [row["prefill_ms"] for row in line],
                [row["perplexity"] for row in line],
                _style(line[-1]),
                color=colour,
                markersize=3.5,
                linewidth=1.2,
            )
        for row in dense:
            _beside(axes, kind, (row["prefill_ms"], row["perplexity"]), colour)
    axes.set_xlabel("ms for a token of the prompt")
    axes.set_title("prefill: a line for each type, from dense to pruned", fontsize="medium")
    _say_widths(axes, rows)


def _say_widths(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Legend of the two kinds of widths, if there are both."""
    if {row["uniform"] for row in rows if row["structure"]} == {True, False}:
        axes.plot([], [], "o-", color="0.4", markersize=3.5, linewidth=1.2, label="uneven widths")
        axes.plot([], [], "s--", color="0.4", markersize=3.5, linewidth=1.2, label="uniform")
        axes.legend(frameon=False, fontsize="small")


def _style(row: dict[str, Any]) -> str:
    return "s--" if row["uniform"] else "o-"


def _beside(axes: Axes, text: str, place: tuple[float, float], colour: str, left: bool = False) -> None:
    """Write a label to the right of a point, or to the left below it."""
    axes.annotate(
        text,
        place,
        xytext=(-4, -7) if left else (5, 0),
        textcoords="offset points",
        color=colour,
        fontsize=8,
        ha="right" if left else "left",
        va="center",
    )
