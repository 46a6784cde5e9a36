"""Growth of a shot's time and memory with tokens (x8), width (x4) and depth (x4), on random Llama-like models.

    python benchmarks/growth.py

One shot to 80 % by rows and columns, on random tokens. Each point is measured in a process of its own, by the better of
two shots; the exponent of a line is the slope of its fit in logarithms. Some four minutes on 2 cores.
Writes benchmarks/results/growth.json, growth.md and growth.png.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import COLOURS, circumstances, figure, save, table, write
from transformers import LlamaConfig, LlamaForCausalLM

from llm_surgeon import PruneConfig
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models import examine, family_of
from llm_surgeon.pruning.shots import run_shots
from llm_surgeon.session.session import Session
from llm_surgeon.system.allocator import keep_freed_memory
from llm_surgeon.system.memory import peak_resident_bytes, reset_peak

COMMAND = "python benchmarks/growth.py"
VOCABULARY, LENGTH, BATCH, HEAD = 2048, 256, 2, 64
REPEATS = 2


@dataclass(frozen=True)
class Point:
    """Size of one measurement; the feed-forward part is 8/3 as wide, a third of the heads have keys and values."""

    tokens: int = 2048
    width: int = 384
    depth: int = 2


AXES: dict[str, list[Point]] = {
    "tokens": [Point(tokens=tokens) for tokens in (2048, 4096, 8192, 16_384)],
    "width": [Point(width=width) for width in (384, 768, 1152, 1536)],
    "depth": [Point(depth=depth) for depth in (2, 4, 6, 8)],
}
# Exponents in theory, for large sizes. Memory is the peak above that of the process before there is a model.
EXPECTED = {
    "tokens": {"curvature": 1, "selection": 0, "update": 0, "memory": 0},
    "width": {"curvature": 2, "selection": 3, "update": 3, "memory": 2},
    "depth": {"curvature": 1, "selection": 1, "update": 1, "memory": 1},
}
LINES = ("curvature", "selection", "update", "memory")


def model_of(point: Point, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """Make a random model of the size of a point."""
    torch.manual_seed(0)
    heads = point.width // HEAD
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=point.width,
            intermediate_size=8 * point.width // 3,
            num_hidden_layers=point.depth,
            num_attention_heads=heads,
            num_key_value_heads=heads // 3,
            head_dim=HEAD,
            tie_word_embeddings=True,
        )
    ).eval()


def measure(point: Point) -> dict[str, float]:
    """Measure seconds by phase and bytes of a shot, in a process that does nothing else.

    Of two shots, each on a model of its own, the better time counts: in the first, kernels are chosen for each shape
    of a product. Memory is that of the first shot.
    """
    keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (point.tokens // LENGTH, LENGTH), generator=generator)
    config = PruneConfig(preset="none", sparsity=0.2, shots=1, batch_size=BATCH, device="cpu")
    reset_peak()
    before, shots = peak_resident_bytes(), []
    for _ in range(REPEATS):
        model = model_of(point)
        anatomy = examine(model, family_of("llama"))
        shots += run_shots(Session(model, anatomy, CalibrationTokens(ids, None, {}), config))
    taken = [{stage.name: stage.seconds for stage in shot.stages} for shot in shots]
    seconds = {phase: min(shot[phase] for shot in taken) for phase in taken[0]}
    return {**seconds, "memory": max(stage.peak for stage in shots[0].stages) - before}


def measure_in_process(point: Point) -> dict[str, float]:
    """Measure a point in a process of its own."""
    command = [sys.executable, __file__, "--point", json.dumps(asdict(point))]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {line: found[line] for line in LINES}


def slope(sizes: list[int], values: list[float]) -> float:
    """Slope of the line of least squares through the logarithms."""
    x, y = ([math.log(number) for number in numbers] for numbers in (sizes, values))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum((a - middle_x) ** 2 for a in x)


def sizes_of(axis: str) -> list[int]:
    """Sizes along an axis."""
    return [getattr(point, axis) for point in AXES[axis]]


def markdown(result: dict[str, Any]) -> str:
    """Tables of the exponents and of the measurements, as Markdown."""
    exponents = [
        (axis, *(f"{result['exponents'][axis][line]:.2f} ({EXPECTED[axis][line]})" for line in LINES)) for axis in AXES
    ]
    sizes, found = sizes_of("width")[-2:], result["points"]["width"][-2:]
    last = (f"{slope(sizes, [point[line] for point in found]):.2f} ({EXPECTED['width'][line]})" for line in LINES)
    exponents.insert(2, (f"width, {sizes[0]:,} to {sizes[1]:,}", *last))
    rows = [
        (f"{axis} {size:,}", *(f"{found[line]:.2f}" for line in LINES[:-1]), f"{found['memory'] / 2**20:,.0f}")
        for axis in AXES
        for size, found in zip(sizes_of(axis), result["points"][axis], strict=True)
    ]
    base = Point()
    return (
        f"# Growth\n\n{result['date']}, {result['machine']}, {result['threads']} threads. Command: "
        f"`{result['command']}`\n\nOne shot to 80 % by rows and columns, random Llama-like models with a vocabulary of "
        f"{VOCABULARY:,}; what does not vary is {base.tokens:,} tokens (batches of {BATCH} x {LENGTH}), a width of "
        f"{base.width} and {base.depth} blocks. Exponents, with those of theory in brackets:\n\n"
        f"{table(('grows with', *LINES), exponents)}\n\n![Time and memory against size](growth.png)\n\n{NOTE}\n\n"
        f"{table(('', 'curvature (s)', 'selection (s)', 'update (s)', 'memory (MiB)'), rows)}\n"
    )


NOTE = """\
Straight lines with the slope of theory: time of the curvature against tokens and depth (each token passes each layer
once), and all phases against depth (each layer is decomposed once). Selection and update do not depend on the tokens,
and neither does memory: the sums have the size of the factors, and one batch is in memory at a time.

Against the width, products (passes and factor sums) have the exponent 2 at a fixed number of tokens, decompositions 3.
The measured ones are lower, and come nearer towards the largest widths (third line): attention scores, norms and the
vocabulary's logits grow with the first power or not at all, small matrices do not fill the cores, and what surrounds
short decompositions outweighs them (reading the strips of the sums, products with the weights, sorting of candidates).
Memory against width and depth begins with what does not grow so (activations of a batch, logits, buffers of libraries),
hence exponents below 2 and 1; in batch-major order the factors of all layers are held at once, so it does grow with
depth."""


def draw(result: dict[str, Any]) -> None:
    """Draw time above and memory below; the dashed lines from the last point have the slope of theory."""
    picture = figure(9.0, 5.6)
    grid = picture.subplots(2, len(AXES), sharey="row")
    for column, axis in enumerate(AXES):
        sizes, points = sizes_of(axis), result["points"][axis]
        for number, line in enumerate(LINES):
            axes = grid[int(line == "memory"), column]
            scale = 2**20 if line == "memory" else 1
            values = [point[line] / scale for point in points]
            exponent, colour = result["exponents"][axis][line], COLOURS[number]
            axes.loglog(sizes, values, "o-", color=colour, label=f"{line}: {exponent:.2f}")
            theory = [values[-1] * (size / sizes[-1]) ** EXPECTED[axis][line] for size in sizes]
            axes.loglog(sizes, theory, "--", color=colour, linewidth=0.8)
        for axes, what in zip(grid[:, column], ("seconds", "MiB above the libraries"), strict=True):
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
            axes.minorticks_off()
            axes.grid(visible=True, linewidth=0.3)
            axes.legend(fontsize="x-small")
            if not column:
                axes.set_ylabel(what)
        grid[1, column].set_xlabel(axis)
    # Set at the end: limits stay once they are set, whatever is drawn after that.
    grid[1, 0].set_ylim(bottom=32)
    save(picture, "growth", dpi=110)


def main() -> None:
    """Measure all points and write the result, or one point in the process that measures it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(replace(Point(), **json.loads(arguments.point)))))
        return
    known: dict[Point, dict[str, float]] = {}
    for point in (point for points in AXES.values() for point in points):
        if point not in known:
            known[point] = measure_in_process(point)
    points = {axis: [known[point] for point in AXES[axis]] for axis in AXES}
    exponents = {
        axis: {line: slope(sizes_of(axis), [point[line] for point in points[axis]]) for line in LINES} for axis in AXES
    }
    result = {**circumstances(COMMAND), "sizes": {axis: sizes_of(axis) for axis in AXES}, "points": points}
    result |= {"exponents": exponents, "expected": EXPECTED}
    write("growth", result, markdown(result))
    draw(result)


if __name__ == "__main__":
    main()
