"""Benchmark of the plan: predictions of ``llm-surgeon plan`` against the same runs, in fresh processes.

Two models (the demo, and a random Qwen 2 of other proportions: few wide blocks, biases, an output head of its own) in
three settings each. Few samples are enough for a peak. Run it without OMP_NUM_THREADS: memory depends on threads.

    python benchmarks/memory.py CALIBRATION.txt EVALUATION.txt [--again]

``--again`` predicts anew and keeps earlier measurements. Writes benchmarks/results/memory.json and memory.md after each
run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import circumstances, finished, table, write
from transformers import Qwen2Config, Qwen2ForCausalLM

from llm_surgeon import Plan, PruneReport
from llm_surgeon.models.loading import load_tokenizer, resolve_source

SETTINGS: dict[str, dict[str, Any]] = {
    "2 x 512": {"batch_size": 2, "seq_len": 512},
    "1 x 256": {"batch_size": 1, "seq_len": 256},
    "4 x 512, 24 samples, --preset fast": {"batch_size": 4, "seq_len": 512, "samples": 24, "preset": "fast"},
}
SHORT = {"preset": "none", "shots": 2, "sparsity": 0.4, "samples": 4, "eval_tokens": 2048}
COMMAND = "python benchmarks/memory.py CALIBRATION.txt EVALUATION.txt"


def other_model(directory: Path) -> Path:
    """Write a random model with the demo's vocabulary and 168M parameters to a directory."""
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


def options_of(setting: dict[str, Any], texts: list[str]) -> list[str]:
    """Options of the command line for a setting."""
    recipe = SHORT | setting
    if "preset" in setting:
        del recipe["shots"]
    options = {**recipe, "calibration": texts[0], "evaluation": texts[1], "device": "cpu"}
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def predicted(model: str, options: list[str], out: Path) -> dict[str, Any]:
    """Plan a run in a fresh process, and read the plan."""
    command = [sys.executable, "-m", "llm_surgeon", "plan", model, "--out", str(out), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    plan = Plan.model_validate_json(out.read_text(encoding="utf8"))
    shots = sum(phase.seconds for phase in plan.phases if phase.name in PHASES)
    return {
        "peak": plan.peak,
        "weight_bytes": plan.weight_bytes,
        "shot_seconds": shots,
        "largest": max((x for x in plan.phases if x.reports), key=lambda x: x.host_bytes).model_dump(),
    }


def measured(model: str, options: list[str], out: Path) -> dict[str, Any]:
    """Prune in a fresh process, and read its report."""
    subprocess.run([sys.executable, "-m", "llm_surgeon", "prune", model, "--out", str(out), *options], check=True)
    report = PruneReport.model_validate_json((out / "report.json").read_text(encoding="utf8"))
    assert report.export is not None
    return {
        "peak": report.memory.peak,
        "weight_bytes": report.export.weight_bytes,
        "shot_seconds": sum(shot.seconds for shot in report.shots),
        "peaks": {
            stage.name: max(shot.stage(stage.name).peak for shot in report.shots) for stage in report.shots[0].stages
        },
    }


def markdown(result: dict[str, Any]) -> str:
    """Tables of the result, as Markdown."""
    rows, parts = [], []
    for found in result["runs"]:
        setting, before, after = found["setting"], found["predicted"], found["measured"]
        rows.append(
            (
                setting,
                f"{before['peak'] / 2**20:,.0f}",
                f"{after['peak'] / 2**20:,.0f}",
                f"{100 * (before['peak'] / after['peak'] - 1):+.1f} %",
                f"{before['weight_bytes'] / 2**20:,.1f}",
                f"{after['weight_bytes'] / 2**20:,.1f}",
                f"{before['shot_seconds']:,.0f}",
                f"{after['shot_seconds']:,.0f}",
            )
        )
        largest = before["largest"]
        parts.append((setting, largest["name"], *(f"{largest['host'].get(x, 0) / 2**20:,.0f}" for x in PARTS)))
    heading = ("batch x tokens", "peak, predicted (MiB)", "measured", "error", "weight files, predicted (MiB)",
               "measured", "shots, predicted (s)", "measured")  # fmt: skip
    return (
        f"# Plan against run\n\n{result['date']}, {result['machine']}, {result['threads']} threads. "
        f"Command: `{result['command']}`\n\nRows and columns, {SHORT['shots']} shots to "
        f"{100 * (1 - SHORT['sparsity']):g} % of the prunable weights, {SHORT['samples']} samples, if not said "
        f"otherwise; evaluation windows of 1,024 tokens.\n\n{table(heading, rows)}\n\n"
        f"The parts of the predicted peak, in MiB:\n\n{table(('batch x tokens', 'phase', *PARTS), parts)}\n\n"
        f"{NOTE}\n"
    )


# Phases that make up the seconds of a shot.
PHASES = ("curvature", "selection", "update", "reconstruction", "gates")
PARTS = (
    *("process", "weights", "pruned weights", "weights of the other half", "dense weights to reconstruct"),
    *("factors", "passes", "effects of gates", "allocator", "freed logits"),
)


NOTE = """\
What is `allocator` and `freed logits` was fitted to these runs, and to one more (demo, 4 x 512, 8 samples, three shots
to 70 %, no evaluation): 4,590 MiB measured, 4,643 predicted.

Seconds are of rates of a common machine, without `--probe`."""


def main() -> None:
    """Predict and measure both models in all settings, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--again", action="store_true", help="predict anew, keep what was measured")
    arguments = parser.parse_args()
    texts = [arguments.calibration, arguments.evaluation]
    earlier = finished("memory")
    before = {found["setting"]: found["measured"] for found in earlier["runs"]} if arguments.again else {}
    when = {key: earlier[key] for key in ("date", "machine", "threads", "command")} if arguments.again else {}
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        other = other_model(Path(scratch) / "random Qwen 2")
        for label, setting in SETTINGS.items():
            for model in ("demo", str(other)):
                name = f"{Path(model).name}, {label}"
                options, out = options_of(setting, texts), Path(scratch) / name
                foreseen = predicted(model, options, out.with_suffix(".json"))
                found = before.get(name) or measured(model, options, out)
                runs.append({"setting": name, "predicted": foreseen, "measured": found})
                result = {**circumstances(COMMAND), **when, "recipe": SHORT, "runs": runs}
                write("memory", result, markdown(result))


if __name__ == "__main__":
    main()
