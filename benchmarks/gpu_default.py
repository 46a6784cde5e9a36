"""Cost of the default recipe on one GPU, from a few blocks of a random model at the full width of a shape.

    python benchmarks/gpu_default.py --shape 8b [--samples 8] [--seq-len 2048]
    python benchmarks/gpu_default.py --shape toy --device cpu     # the same in seconds, to see that it runs

The model is made on the device with random weights in bfloat16, so nothing is downloaded. One shot of the preset
best, layer by layer, is made by the code of the pipeline: curvature, selection, update, reconstruction and gates.
Seconds of a phase are ``a + b d + n (c + e d)`` with ``d`` blocks and ``n`` tokens, of which four runs give the four
numbers: with few and with more blocks, on half and on all of --samples. The full depth and 128 sequences follow from
these. Products of the effects of all gates, which grow with the square of the depth, are left out: 8,192 gates take
seconds on a GPU.

The rate of a large bfloat16 product and the bandwidth of a copy are measured on the same device. Peaks are those of the
measured blocks; what a whole run needs is the plan's (``llm-surgeon plan --device cuda --device-memory 24GB``).

Writes benchmarks/results/gpu_default_SHAPE.json and .md, unless --shape is toy.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import circumstances, table, write
from gpu import FULL_SAMPLES, limits, random_model
from transformers import LlamaForCausalLM

from llm_surgeon import PruneConfig
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.loading import resolve_device
from llm_surgeon.pruning.result import ShotResult
from llm_surgeon.pruning.shots import run_shots
from llm_surgeon.refit.gates_stage import GatesStage
from llm_surgeon.refit.stages import with_dense
from llm_surgeon.session.session import Session
from llm_surgeon.system.storage import TensorStore
from llm_surgeon.versions import versions

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "70b": {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_key_value_heads": 8},
    "toy": {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_key_value_heads": 2},
}
VOCABULARY = {"8b": 128_256, "70b": 128_256, "toy": 256}
DEPTH = {"8b": 32, "70b": 80, "toy": 6}
# Blocks of the two measured depths.
BLOCKS = (1, 3)


def model_of(blocks: int, arguments: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    """Make a random model of so many blocks of the shape, in bfloat16."""
    shape = {**SHAPES[arguments.shape], "num_hidden_layers": blocks}
    return random_model(shape, VOCABULARY[arguments.shape], arguments.seq_len, device)


def shot_of(blocks: int, samples: int, arguments: argparse.Namespace, device: torch.device) -> ShotResult:
    """Make the shot of the default recipe on a random model of so many blocks."""
    config = PruneConfig(
        preset="best",
        structure="neurons+heads",
        sparsity=0.2,
        samples=FULL_SAMPLES,
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
    )
    # As many neurons share gates as in the whole model.
    whole = model_of(DEPTH[arguments.shape], arguments, torch.device("meta"))
    config = GatesStage.resolved(config, examine(whole, family_of("llama"))).model_copy(update={"samples": samples})
    model = model_of(blocks, arguments, device)
    anatomy = examine(model, family_of("llama"))
    shape = samples, arguments.seq_len
    ids = torch.randint(VOCABULARY[arguments.shape], shape, generator=torch.Generator().manual_seed(1))
    store = TensorStore(device)
    session = with_dense(Session(model, anatomy, CalibrationTokens(ids, None, {}), config, store=store))
    return next(iter(run_shots(session)))


def measured(blocks: int, samples: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure one shot: a row of the table."""
    shot = shot_of(blocks, samples, arguments, device)
    seconds = {stage.name: stage.seconds for stage in shot.stages}
    print(blocks, samples, {name: round(value, 3) for name, value in seconds.items()}, flush=True)
    return {"blocks": blocks, "samples": samples, "seconds": seconds, "peak": max(stage.peak for stage in shot.stages)}


def extrapolated(rows: list[dict[str, Any]], phase: str, depth: int, samples: int) -> float:
    """Seconds of a phase at another depth and number of sequences, by the plane of the docstring through four runs."""
    design = [[1.0, row["blocks"], row["samples"], row["blocks"] * row["samples"]] for row in rows]
    taken = [[row["seconds"].get(phase, 0.0)] for row in rows]
    numbers = torch.linalg.solve(torch.tensor(design, dtype=torch.float64), torch.tensor(taken, dtype=torch.float64))
    at = torch.tensor([1.0, depth, samples, depth * samples], dtype=torch.float64)
    return max(0.0, float(at @ numbers))


def markdown(result: dict[str, Any]) -> str:
    """Table of the result, and its circumstances, as Markdown."""
    phases = list(result["whole"])
    rows = [
        (
            f"{row['blocks']} blocks, {row['samples']} x {result['seq_len']:,}",
            *(f"{row['seconds'][phase]:.2f}" for phase in phases),
            f"{sum(row['seconds'].values()):.2f}",
            f"{row['peak'] / 2**30:.1f}",
        )
        for row in result["rows"]
    ]
    whole = result["whole"]
    name = f"**{result['depth']} blocks, {FULL_SAMPLES} x {result['seq_len']:,}** (extrapolated)"
    rows.append((name, *(f"{whole[phase]:.0f}" for phase in phases), f"**{sum(whole.values()):.0f}**", "-"))
    return (
        f"# The default recipe on blocks of the Llama {result['shape']} shape\n\n{result['date']}, {result['device']}, "
        f"torch {result['versions']['torch']}. Command: `{result['command']}`\n\nSeconds of each phase; peak in GiB. A "
        f"large product has {result['limits']['matrix_rate'] / 1e12:.1f} TFLOP/s, a copy moves "
        f"{result['limits']['bandwidth'] / 1e9:.0f} GB/s.\n\n{table(('', *phases, 'sum', 'peak'), rows)}\n\n"
        "Without evaluation, export and moves of weights between host and device.\n"
    )


def main() -> None:
    """Measure four runs, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.shape == "toy":
        arguments.samples, arguments.seq_len = min(arguments.samples, 8), min(arguments.seq_len, 32)
    device = resolve_device(arguments.device)
    # Kernels are chosen, and memory is taken, in a run that is not measured.
    shot_of(1, 2, arguments, device)
    rows = [
        measured(blocks, samples, arguments, device)
        for blocks in BLOCKS
        for samples in (arguments.samples // 2, arguments.samples)
    ]
    depth = DEPTH[arguments.shape]
    whole = {phase: extrapolated(rows, phase, depth, FULL_SAMPLES) for phase in rows[-1]["seconds"]}
    result = {
        **circumstances(f"python benchmarks/gpu_default.py --shape {arguments.shape}"),
        "shape": arguments.shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "versions": versions(),
        "depth": depth,
        "seq_len": arguments.seq_len,
        "limits": limits(device),
        "rows": rows,
        "whole": whole,
    }
    text = markdown(result)
    print(text)
    if arguments.shape != "toy":
        write(f"gpu_default_{arguments.shape}", result, text)


if __name__ == "__main__":
    main()
