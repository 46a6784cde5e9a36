"""Speed of a gated feed-forward part by its width: where rounding the number of neurons pays.

    python benchmarks/widths.py [--device cpu|cuda] [--dtype float32|bfloat16]

Times the three matrices of SmolLM2-135M's feed-forward part on 512 tokens and on one, at widths around half of the
dense one that are multiples of 1, 2, 4, ... and of nothing larger. Writes benchmarks/results/widths.json and .md.
"""

from __future__ import annotations

import argparse
import random
from statistics import median
from time import perf_counter

import torch
from common import circumstances, table, write
from torch.nn import functional as F

HIDDEN, DENSE = 576, 1536
MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128)
AROUND, SPREAD, WIDTHS, REPEATS = 768, 256, 8, 40


def main() -> None:
    """Time the widths of every multiple in turn, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    rows = {tokens: measure(tokens, device, dtype) for tokens in (512, 1)}
    where = circumstances("python benchmarks/widths.py") | {"device": str(device), "dtype": arguments.dtype}
    text = (
        f"# Feed-forward time by the multiple of its width\n\nNanoseconds per neuron, {WIDTHS} random widths of each "
        f"multiple within {AROUND - SPREAD} to {AROUND + SPREAD}, median of {REPEATS} runs each, all in turn; dense: "
        f"{DENSE}. {arguments.dtype} on {device}, torch {torch.__version__}, {where['date']}, {where['machine']}. "
        f"Command: `{where['command']}`\n\n"
    )
    lines = [(name, *(f"{rows[tokens][name]:,.0f}" for tokens in rows)) for name in rows[512]]
    write("widths", where | {"rows": rows}, text + table(("multiple of", "512 tokens", "one token"), lines) + "\n")


def measure(tokens: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measure nanoseconds per neuron of one pass, by multiple."""
    generator = random.Random(0)
    chosen = {str(multiple): [width_of(multiple, generator) for _ in range(WIDTHS)] for multiple in MULTIPLES}
    chosen["dense"] = [DENSE] * WIDTHS
    jobs = [(name, weights(width, device, dtype)) for name, widths in chosen.items() for width in widths]
    x = torch.randn(tokens, HIDDEN, device=device, dtype=dtype)
    seconds: list[list[float]] = [[] for _ in jobs]
    for _ in range(REPEATS + 2):
        for (_, (gate, up, down)), timings in zip(jobs, seconds, strict=True):
            start = perf_counter()
            F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
            if device.type == "cuda":
                torch.cuda.synchronize()
            timings.append(perf_counter() - start)
    by_name: dict[str, list[float]] = {}
    for (name, (gate, _, _)), timings in zip(jobs, seconds, strict=True):
        # The first two runs choose kernels and allocate memory.
        by_name.setdefault(name, []).append(1e9 * median(timings[2:]) / len(gate))
    return {name: median(values) for name, values in by_name.items()}


def width_of(multiple: int, generator: random.Random) -> int:
    """Draw a width that is a multiple of ``multiple``, and not of twice that."""
    odd = generator.randrange((AROUND - SPREAD) // multiple, (AROUND + SPREAD) // multiple) | 1
    return odd * multiple


def weights(width: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make random matrices gate, up and down of a feed-forward part."""
    shapes = ((width, HIDDEN), (width, HIDDEN), (HIDDEN, width))
    gate, up, down = (torch.randn(shape, device=device, dtype=dtype) / 30 for shape in shapes)
    return gate, up, down


if __name__ == "__main__":
    with torch.inference_mode():
        main()
