"""Growth of the default recipe's peak memory with depth (x4), tokens (x4) and width (x4), under a limit.

    python benchmarks/growth_streamed.py CALIBRATION.txt

Random Llama-like models with the demo's tokenizer, weights streamed. All depths and all numbers of tokens have the same
limit of host memory, a tenth above what the smallest of them cannot do without; each width has its own. The peak is the
largest resident memory of the process while it prunes. Some ten minutes on 2 cores.
Writes benchmarks/results/growth_streamed.json, growth_streamed.md and growth_streamed.png.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import COLOURS, circumstances, figure, save, table, write
from growth import LENGTH, Point, model_of

from llm_surgeon import PruneReport
from llm_surgeon.models.loading import load_tokenizer, resolve_source

# Share by which the limit exceeds what the run cannot do without.
ROOM = 0.1
BASE = Point(tokens=8192, depth=6)
AXES: dict[str, list[Point]] = {
    "depth": [replace(BASE, depth=depth) for depth in (6, 12, 24)],
    "tokens": [replace(BASE, tokens=tokens) for tokens in (8192, 16_384, 32_768)],
    "width": [replace(BASE, width=width) for width in (384, 768, 1536)],
}


def save_model(point: Point, directory: Path) -> None:
    """Write a random model of the size of a point, with the demo's tokenizer."""
    tokenizer = load_tokenizer(resolve_source("demo"))
    model_of(point, len(tokenizer)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def call(point: Point, command: str, model: Path, calibration: Path, limit: int, *more: str) -> str:
    """Run the package's command under a limit in MiB; returns all that it says."""
    arguments = [command, str(model), "--calibration", str(calibration), "--evaluation", "none", "--seq-len", LENGTH]
    arguments += ["--samples", point.tokens // LENGTH, "--weights", "streamed", "--host-memory", f"{limit}MiB", *more]
    arguments += ["--device", "cpu", "--sparsity", "0.2"]
    called = subprocess.run(
        [sys.executable, "-m", "llm_surgeon", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return f"{called.stdout}\n{called.stderr}"


def limit_of(point: Point, model: Path, calibration: Path) -> int:
    """Limit of a run in MiB: a tenth above what it cannot do without, as the plan says."""
    said = " ".join(call(point, "plan", model, calibration, 1).split())
    found = re.search(r"needs about ([\d.]+) GiB", said)
    if found is None:
        raise SystemExit(f"The plan does not say what the run needs: {said[-500:]}")
    return round((1 + ROOM) * float(found[1]) * 1024)


def measure(point: Point, calibration: Path, limit: int | None) -> dict[str, Any]:
    """Prune a model of the size of a point, and report its peak and limit in MiB."""
    with tempfile.TemporaryDirectory() as place:
        model, out = Path(place) / "model", Path(place) / "out"
        save_model(point, model)
        limit = limit or limit_of(point, model, calibration)
        said = call(point, "prune", model, calibration, limit, "--out", str(out))
        if not (out / "report.json").exists():
            raise SystemExit(said[-2000:])
        report = PruneReport.model_validate_json((out / "report.json").read_text(encoding="utf8"))
        weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    peak = max(shot.peak for shot in report.shots)
    return {"peak": peak / 2**20, "limit": limit, "weights": weights / 2**20}


def markdown(result: dict[str, Any]) -> str:
    """Table of the peaks, as Markdown."""
    rows = [
        (
            f"{axis} {getattr(point, axis):,}",
            f"{found['weights']:,.0f}",
            f"{found['limit']:,}",
            f"{found['peak']:,.0f}",
            f"{found['peak'] / result['points'][axis][0]['peak']:.2f}",
        )
        for axis, points in AXES.items()
        for point, found in zip(points, result["points"][axis], strict=True)
    ]
    header = ("", "weights (MiB)", "limit (MiB)", "peak (MiB)", "peak to the first")
    return f"""\
# Growth of the default recipe under a limit

{result["date"]}, {result["machine"]}, {result["threads"]} threads. Command: `{result["command"]}`

Random Llama-like models with the demo's vocabulary, `--preset best --weights streamed --sparsity 0.2`; what does not
vary is {BASE.tokens:,} tokens, a width of {BASE.width} and {BASE.depth} blocks. All depths and tokens have one limit,
each width its own: a tenth above what the run cannot do without.

{table(header, rows)}

![Peak memory against size](growth_streamed.png)
"""


def draw(result: dict[str, Any]) -> None:
    """Draw the peaks and the limits against depth, tokens and width."""
    picture = figure(9.0, 2.8)
    for axes, axis in zip(picture.subplots(1, len(AXES), sharey=True), AXES, strict=True):
        sizes = [getattr(point, axis) for point in AXES[axis]]
        for name, colour, style in (("peak", COLOURS[0], "o-"), ("limit", COLOURS[1], "--")):
            axes.plot(sizes, [found[name] for found in result["points"][axis]], style, color=colour, label=name)
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.grid(visible=True, linewidth=0.3)
        axes.set_xlabel(axis)
    axes.legend(fontsize="x-small")
    picture.axes[0].set_ylabel("MiB resident")
    # The axis is shared, and holds what has been drawn by now.
    picture.axes[0].set_ylim(bottom=0)
    save(picture, "growth_streamed", dpi=110)


def main() -> None:
    """Measure all points and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration", type=Path)
    calibration = parser.parse_args().calibration
    known: dict[Point, dict[str, Any]] = {BASE: measure(BASE, calibration, None)}
    for axis, points in AXES.items():
        for point in points:
            if point not in known:
                known[point] = measure(point, calibration, None if axis == "width" else known[BASE]["limit"])
                print(point, known[point], file=sys.stderr)
    result = circumstances("python benchmarks/growth_streamed.py CALIBRATION.txt")
    result |= {"points": {axis: [known[point] for point in points] for axis, points in AXES.items()}}
    write("growth_streamed", result, markdown(result))
    draw(result)


if __name__ == "__main__":
    main()
