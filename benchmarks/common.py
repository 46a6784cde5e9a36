"""Common parts of the benchmarks: the protocol, the files of results, and the circumstances of a measurement."""

from __future__ import annotations

import datetime
import io
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from llm_surgeon import PruneConfig, PruneReport, prune
from llm_surgeon.models.loading import load_model, load_tokenizer, resolve_source
from llm_surgeon.pruning import shots
from llm_surgeon.run import job
from llm_surgeon.system.progress import RichProgress

RESULTS = Path(__file__).parent / "results"

# 32 windows of 512 tokens to calibrate on, 20 windows of 1,024 to evaluate on: SmolLM2-135M-Instruct, the demo model.
PROTOCOL: dict[str, Any] = {
    "preset": "none",
    "sparsity": 0.5,
    "shots": 5,
    "samples": 32,
    "seq_len": 512,
    "seed": 0,
    "eval_window": 1024,
    "eval_tokens": 20_480,
}

# Okabe and Ito: colour-blind readers can tell them apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


class _Remembered:
    """A function that remembers its last result by a key, and no result whose key is None.

    Args:
        function: The function.
        key: Makes the key from the arguments.

    Attributes:
        saved: Seconds that the last call would have taken had its result not been remembered.
    """

    def __init__(self, function: Any, key: Any) -> None:
        self._function, self._key, self._results = function, key, {}
        self.saved = 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        key, self.saved = self._key(*arguments), 0.0
        if key is None:
            return self._function(*arguments, **named)
        if key not in self._results:
            self._results.clear()
            begin = time.perf_counter()
            result = self._function(*arguments, **named)
            self._results[key] = result, time.perf_counter() - begin
            return result
        result, self.saved = self._results[key]
        return result


_one_shot = False


def share_dense_work() -> None:
    """Estimate the dense model's curvature once per process for all one-shot runs, its perplexity once for all runs.

    This is only for processes that use one model, one set of texts and one setting of them throughout. The seconds of
    curvature are then those of the run that estimated it, and next to none in the others. ``seconds_saved`` returns the
    missing seconds.
    """
    # The Estimation is the fifth argument of estimate, the description the fourth of measure.
    shots.estimate = _Remembered(shots.estimate, lambda *a: a[4] if _one_shot else None)
    job.measure = _Remembered(job.measure, lambda *a: "dense" if a[3].startswith("dense") else None)


def seconds_saved() -> float:
    """Seconds of curvature that the last run would have taken had it not been estimated before."""
    return shots.estimate.saved if isinstance(shots.estimate, _Remembered) else 0.0


def run(options: dict[str, Any]) -> PruneReport:
    """Prune the demo model in memory by a recipe."""
    source = resolve_source("demo")
    config = PruneConfig.from_mapping(options)
    global _one_shot
    _one_shot = config.shots == 1
    return prune(load_model(source), load_tokenizer(source), config, progress=RichProgress(), source="demo")


def circumstances(command: str) -> dict[str, Any]:
    """Circumstances of a result: date, machine, threads and the command that gives it again."""
    return {
        "date": f"{datetime.date.today()}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {processor()}",
        "threads": torch.get_num_threads(),
        "command": command,
    }


def processor() -> str:
    """Name of the CPU; empty where it is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def write(name: str, result: dict[str, Any], markdown: str) -> None:
    """Write a result as JSON and Markdown."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf8")
    (RESULTS / f"{name}.md").write_text(markdown, encoding="utf8")


def finished(name: str) -> dict[str, Any]:
    """Read an earlier result of the same name; empty if there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf8")) if path.exists() else {}


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table; None is a dash."""
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1), *rows]
    return "\n".join("| " + " | ".join("-" if cell is None else str(cell) for cell in line) + " |" for line in lines)


def figure(width: float = 8.0, height: float = 4.6) -> Figure:
    """Make an empty figure, in inches, that can be saved as PNG."""
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def save(picture: Figure, name: str, dpi: int) -> None:
    """Write a figure as PNG with a palette of 64 colours, which takes a quarter of the bytes of one without."""
    full = io.BytesIO()
    picture.savefig(full, format="png", dpi=dpi)
    palette = Image.open(full).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    palette.save(RESULTS / f"{name}.png", optimize=True)
