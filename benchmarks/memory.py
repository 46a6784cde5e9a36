"""Plan against run: what ``llm-surgeon plan`` predicts, and what the same run then uses, in fresh processes.

Two models (the demo, and a random Qwen 2 of other proportions: few wide blocks, biases, an output head of its own) in
two settings each. Few samples are enough for a peak. To be run without OMP_NUM_THREADS: memory depends on threads.

    python benchmarks/memory.py CALIBRATION.txt EVALUATION.txt

Writes benchmarks/results/memory.json and memory.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import circumstances, table, write
from transformers import Qwen2Config, Qwen2ForCausalLM

from llm_surgeon import PruneReport
from llm_surgeon.models.loading import load_tokenizer, resolve_source

SETTINGS: list[dict[str, Any]] = [
    {"batch_size": 2, "seq_len": 512},
    {"batch_size": 1, "seq_len": 256},
]
SHORT = {"shots": 2, "sparsity": 0.4, "samples": 4, "eval_tokens": 2048}
COMMAND = "python benchmarks/memory.py CALIBRATION.txt EVALUATION.txt"


def other_model(directory: Path) -> Path:
    """A random model with the demo's vocabulary, 168M parameters."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=49_152,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)
    load_tokenizer(resolve_source("demo")).save_pretrained(directory)
    return directory


def run(model: str, setting: dict[str, Any], texts: list[str], out: Path) -> PruneReport:
    """Prune in a fresh process, and read its report."""
    options = {**SHORT, **setting, "calibration": texts[0], "evaluation": texts[1], "device": "cpu"}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    subprocess.run([sys.executable, "-m", "llm_surgeon", "prune", model, "--out", str(out), *flags], check=True)
    return PruneReport.model_validate_json((out / "report.json").read_text(encoding="utf8"))


def row(name: str, setting: dict[str, Any], report: PruneReport) -> dict[str, Any]:
    """What is compared of one run."""
    plan, export = report.plan, report.export
    assert plan is not None
    assert export is not None
    shots = {phase: max(shot.peaks[phase] for shot in report.shots) for phase in report.shots[0].peaks}
    predicted = {phase.name: phase for phase in plan.phases}
    return {
        "model": name,
        **setting,
        "predicted_peak": plan.peak,
        "measured_peak": report.memory.peak,
        "predicted_weight_bytes": plan.weight_bytes,
        "measured_weight_bytes": export.weight_bytes,
        "predicted_shot_seconds": sum(predicted[phase].seconds for phase in ("curvature", "selection", "update")),
        "measured_shot_seconds": sum(shot.seconds for shot in report.shots),
        "measured_peaks": shots,
        "plan": plan.model_dump(),
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables of the result."""
    rows, parts = [], []
    for found in result["runs"]:
        setting = f"{found['model']}, {found['batch_size']} x {found['seq_len']}"
        peak, weights = found["predicted_peak"], found["predicted_weight_bytes"]
        rows.append(
            (
                setting,
                f"{peak / 2**20:,.0f}",
                f"{found['measured_peak'] / 2**20:,.0f}",
                f"{100 * (peak / found['measured_peak'] - 1):+.1f} %",
                f"{weights / 2**20:,.1f}",
                f"{found['measured_weight_bytes'] / 2**20:,.1f}",
                f"{found['predicted_shot_seconds']:,.0f}",
                f"{found['measured_shot_seconds']:,.0f}",
            )
        )
        curvature = next(phase for phase in found["plan"]["phases"] if phase["name"] == "curvature")
        parts.append((setting, *(f"{curvature['host'].get(part, 0) / 2**20:,.0f}" for part in PARTS)))
    heading = ("batch x tokens", "peak, predicted (MiB)", "measured", "error", "weight files, predicted (MiB)",
               "measured", "shots, predicted (s)", "measured")  # fmt: skip
    return (
        f"# Plan against run\n\n{result['date']}, {result['machine']}, {result['threads']} threads. "
        f"Command: `{result['command']}`\n\nRows and columns, {SHORT['shots']} shots to "
        f"{100 * (1 - SHORT['sparsity']):g} % of the prunable weights, {SHORT['samples']} samples, evaluation windows "
        f"of 1,024 tokens.\n\n{table(heading, rows)}\n\nThe parts of the predicted peak, in MiB (the curvature of the "
        f"second shot):\n\n{table(('batch x tokens', *PARTS), parts)}\n\n"
        "Seconds are of rates of a common machine, without `--probe`; others may have used this one at the same time.\n"
    )


PARTS = ("process", "weights", "pruned weights", "factors", "passes", "allocator")


def main() -> None:
    """Run both models in both settings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    arguments = parser.parse_args()
    texts, runs = [arguments.calibration, arguments.evaluation], []
    with tempfile.TemporaryDirectory() as scratch:
        other = other_model(Path(scratch) / "random-qwen2")
        for model in ("demo", str(other)):
            for number, setting in enumerate(SETTINGS):
                out = Path(scratch) / f"{Path(model).name}-{number}"
                runs.append(row(Path(model).name, setting, run(model, setting, texts, out)))
                print(json.dumps({k: v for k, v in runs[-1].items() if k != "plan"}), flush=True)
    result = {**circumstances(COMMAND), "recipe": SHORT, "runs": runs}
    write("memory", result, markdown(result))


if __name__ == "__main__":
    main()
