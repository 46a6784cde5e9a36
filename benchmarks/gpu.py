"""Cost of 40 shots on one GPU, from single shots of a random model of a Llama-2 shape at 100, 75 and 50 % size.

    python benchmarks/gpu.py --shape 7b [--order layer-major] [--samples 8] [--seq-len 2048]
    python benchmarks/gpu.py --shape toy --device cpu       # the same in seconds, to see that it runs

The model is made on the device with random weights in bfloat16, so nothing is downloaded. At each size rows and columns
are cut out at random, and one shot of a 40-shot run to 50 % is made by the code of the pipeline: curvature on --samples
sequences, costs, selection, update. Times are measured in both orders of the passes unless one is named.

Extrapolation: curvature is linear in the tokens, so it is scaled from --samples to 128 sequences; selection and update
do not depend on them. Between the sizes, seconds are interpolated linearly, and summed over the sizes of the 40 shots.

Two limits are measured on the same device: the rate of a large bfloat16 product, and the bandwidth of a copy. A share
near 100 % of either says that only fewer operations or bytes would help.

Writes benchmarks/results/gpu_SHAPE.json and .md, unless --shape is toy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from common import circumstances, table, write
from transformers import LlamaConfig, LlamaForCausalLM

from llm_surgeon import PruneConfig
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models import Anatomy, examine, family_of
from llm_surgeon.models.loading import resolve_device
from llm_surgeon.models.matrix import cut_out
from llm_surgeon.pruning.result import RunState, ShotResult
from llm_surgeon.pruning.shapes import Shapes
from llm_surgeon.pruning.shots import run_shots
from llm_surgeon.session.session import Session
from llm_surgeon.system.storage import TensorStore
from llm_surgeon.versions import versions

SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "toy": {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 3, "num_attention_heads": 4},
}
VOCABULARY = {"7b": 32_000, "13b": 32_000, "toy": 256}
SHOTS, FULL_SAMPLES = 40, 128
SIZES = (1.0, 0.75, 0.5)
ORDERS = ("batch-major", "layer-major")


def recipe(arguments: argparse.Namespace) -> PruneConfig:
    """Recipe of 40 shots to 50 %, on the measured number of sequences."""
    return PruneConfig(
        preset="none",
        sparsity=0.5,
        shots=SHOTS,
        samples=arguments.samples,
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
    )


def random_model(shape: dict[str, int], vocabulary: int, length: int, device: torch.device) -> LlamaForCausalLM:
    """Make a model of a shape with random bfloat16 weights, on a device."""
    settings = LlamaConfig(**shape, vocab_size=vocabulary, max_position_embeddings=length)
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(settings, dtype=torch.bfloat16).eval()


def shot_at(size: float, order: str, arguments: argparse.Namespace, device: torch.device) -> ShotResult:
    """Make one shot of the run, on a model of which ``size`` is left."""
    config = recipe(arguments)
    model = random_model(SHAPES[arguments.shape], VOCABULARY[arguments.shape], arguments.seq_len, device)
    anatomy = examine(model, family_of("llama"), config.ignore)
    since = None
    if size < 1:
        masks = Shapes(config, anatomy).random_masks(1 - size, seed=0)
        cut_out(model, anatomy, masks)
        done = min(SHOTS - 1, round((1 - size) / config.sparsity * SHOTS))
        since = RunState(done, masks)
    shape = arguments.samples, arguments.seq_len
    tokens = torch.randint(VOCABULARY[arguments.shape], shape, generator=torch.Generator().manual_seed(1))
    store = TensorStore(device) if order == "layer-major" else None
    session = Session(model, anatomy, CalibrationTokens(tokens, None, {}), config, store=store)
    return next(iter(run_shots(session, since)))


def pass_operations(anatomy: Anatomy, masks: Any, vocabulary: int, width: int, forward: int) -> float:
    """Operations per token of the model pass and the factor sums.

    Args:
        anatomy: The prunable layers.
        masks: Keep masks of the layers.
        vocabulary: Rows of the head.
        width: Columns of the head.
        forward: Number of forward passes through the blocks.
    """
    shapes = {name: masks[name].shape for name in anatomy.layers}
    blocks = sum(rows * columns for rows, columns in shapes.values())
    groups = {layer.input_group: layer.columns for layer in anatomy.layers.values()}
    sums = sum(columns**2 for columns in groups.values()) + sum(rows**2 for rows, _ in shapes.values())
    return 2 * blocks * (forward + 1) + 4 * vocabulary * width + sums


def limits(device: torch.device) -> dict[str, float]:
    """Measure a device's limits: operations per second of a large bfloat16 product, bytes per second of a copy."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.empty_like(a)
    rate = 2 * size**3 / seconds_of(lambda: torch.mm(a, a), device)
    return {"matrix_rate": rate, "bandwidth": 2 * a.nbytes / seconds_of(lambda: b.copy_(a), device)}


def seconds_of(work: Any, device: torch.device) -> float:
    """Median seconds of some work; the device is waited for before the clock is read."""
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def measured(order: str, size: float, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure one shot: one row of the table."""
    if arguments.warm:
        shot_at(size, order, argparse.Namespace(**{**vars(arguments), "samples": arguments.batch_size}), device)
    shot = shot_at(size, order, arguments, device)
    return {
        "order": order,
        "size": size,
        "seconds": {stage.name: stage.seconds for stage in shot.stages},
        "profile": shot.profile,
        "peak": max(stage.peak for stage in shot.stages),
        "tokens": arguments.samples * arguments.seq_len,
    }


def extrapolated(rows: list[dict[str, Any]], samples: int) -> float:
    """Seconds of 40 shots on 128 sequences, see the module's docstring."""

    def full(row: dict[str, Any]) -> float:
        seconds = row["seconds"]
        return seconds["curvature"] * FULL_SAMPLES / samples + seconds["selection"] + seconds["update"]

    known = sorted((row["size"], full(row)) for row in rows)

    def at(size: float) -> float:
        if len(known) == 1:
            return known[0][1]
        pairs = list(pairwise(known))
        (x, y), (u, v) = next((pair for pair in pairs if size <= pair[1][0]), pairs[-1])
        return y + (v - y) * (size - x) / (u - x)

    return sum(at(1 - 0.5 * shot / SHOTS) for shot in range(SHOTS))


def shares(row: dict[str, Any], arguments: argparse.Namespace, device: torch.device, rate: float) -> float:
    """Share of the rate of a large product that the pass of a shot has reached."""
    with torch.device("meta"):
        settings = LlamaConfig(**SHAPES[arguments.shape], vocab_size=VOCABULARY[arguments.shape])
        model = LlamaForCausalLM._from_config(settings)
    anatomy = examine(model, family_of("llama"), recipe(arguments).ignore)
    masks = anatomy.dense_masks()
    if row["size"] < 1:
        masks = Shapes(recipe(arguments), anatomy).random_masks(1 - row["size"], seed=0)
    forward = 2 if row["order"] == "layer-major" else 1
    operations = pass_operations(anatomy, masks, settings.vocab_size, settings.hidden_size, forward)
    return operations * row["tokens"] / row["seconds"]["curvature"] / rate


def markdown(result: dict[str, Any]) -> str:
    """Table of the result, and its circumstances, as Markdown."""
    parts = list(dict.fromkeys(part for row in result["rows"] for part in row["profile"]))
    rows = [
        (
            f"{row['order']}, {row['size']:.0%}",
            *(f"{row['profile'].get(part, 0.0):.2f}" for part in parts),
            f"{row['peak'] / 2**30:.1f}",
            f"{row['share_of_matrix_rate']:.0%}",
        )
        for row in result["rows"]
    ]
    lines = [
        f"# Shots of a random model of the Llama-2 {result['shape']} shape",
        "",
        f"{result['date']}, {result['device']}, torch {result['versions']['torch']}. Command: `{result['command']}`",
        "",
        f"Seconds of one shot on {result['tokens']:,} tokens; peak in GiB; the pass against a large product's rate "
        f"({result['limits']['matrix_rate'] / 1e12:.1f} TFLOP/s; a copy moves "
        f"{result['limits']['bandwidth'] / 1e9:.0f} GB/s).",
        "",
        table(("order, size", *parts, "peak", "of the matrix rate"), rows),
        "",
    ]
    for order, seconds in result["extrapolated"].items():
        lines.append(
            f"Forty shots to 50 % on 128 x {result['seq_len']:,} tokens, {order}: **{seconds / 60:.1f} minutes** "
            "(curvature scaled with the tokens, sizes interpolated), without evaluation and export."
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure all orders and sizes, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--order", choices=ORDERS)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES)
    parser.add_argument("--no-warm", dest="warm", action="store_false", help="leave out the shot that is not measured")
    arguments = parser.parse_args()
    if arguments.shape == "toy":
        arguments.samples, arguments.seq_len = min(arguments.samples, 4), min(arguments.seq_len, 64)
    device = resolve_device(arguments.device)
    found = limits(device)
    rows = []
    for order in [arguments.order] if arguments.order else ORDERS:
        for size in arguments.sizes:
            row = measured(order, size, arguments, device)
            row["share_of_matrix_rate"] = shares(row, arguments, device, found["matrix_rate"])
            rows.append(row)
            print(order, size, {name: round(seconds, 3) for name, seconds in row["seconds"].items()}, flush=True)
    orders = dict.fromkeys(row["order"] for row in rows)
    result = {
        **circumstances(f"python benchmarks/gpu.py --shape {arguments.shape}"),
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": versions(),
        "tokens": arguments.samples * arguments.seq_len,
        "seq_len": arguments.seq_len,
        "limits": found,
        "rows": rows,
        "extrapolated": {o: extrapolated([r for r in rows if r["order"] == o], arguments.samples) for o in orders},
    }
    text = markdown(result)
    print(text)
    if arguments.shape != "toy":
        write(f"gpu_{arguments.shape}", result, text)


if __name__ == "__main__":
    main()
