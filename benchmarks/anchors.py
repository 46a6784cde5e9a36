"""Benchmark of structured pruning by a fixed protocol: quality, time and memory, against published code.

Protocol: SmolLM2-135M-Instruct (the demo model), 32 windows of 512 tokens of WikiText-2 for calibration, five shots
to 50 % of the prunable weights, perplexity of 20 windows of 1,024 tokens of held-out WikiText-2. The plain pass that
a shot's time is compared with is a bfloat16-autocast forward and backward pass of the dense model over the same
tokens, one sequence at a time, without weight gradients, timed before the first shot and after each, in the same
process. As the speed of a machine changes within minutes, a shot is compared with the mean of the passes around it.
Before, a process of its own writes to more memory than the run takes: a virtual machine is given each page by its host
when it first writes there, 9 to 15 instead of 3 microseconds a page, which a first shot would be charged with. The
published code was measured in the same way.

    python benchmarks/anchors.py CALIBRATION.txt EVALUATION.txt [--set option=value ...]

Writes benchmarks/results/anchors.json and anchors.md, and the export below --out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from common import PROTOCOL, circumstances, write
from torch.nn import functional as F
from transformers import PreTrainedModel

from llm_surgeon import PruneConfig, PruneReport
from llm_surgeon.data.corpora import load_corpus
from llm_surgeon.data.tokens import CalibrationTokens, sample_calibration
from llm_surgeon.models.loading import load_model, load_tokenizer, resolve_source
from llm_surgeon.models.modes import arithmetic, frozen
from llm_surgeon.run.run import prune_checkpoint
from llm_surgeon.system.allocator import keep_freed_memory
from llm_surgeon.system.progress import Phase, RichProgress

PUBLISHED = [26.08, 37.93, 48.83, 70.97, 94.38]
GOAL = [24.5, 29.0, 35.0, 45.0, 57.0]
NAME = "anchors"
# Bytes; a run takes six GiB at its peak.
TOUCHED = 10 * 2**30


def plain_pass(model: PreTrainedModel, tokens: CalibrationTokens) -> float:
    """Seconds of a plain forward and backward pass over all tokens, batch 1, as anyone would write it."""
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, _i, output: output.requires_grad_())
    start = time.perf_counter()
    with frozen(model), arithmetic(torch.device("cpu"), "bfloat16"):
        for ids, _mask in tokens.batches(1):
            logits = model(ids, use_cache=False).logits[:, :-1].float()
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    return time.perf_counter() - start


class Between(RichProgress):
    """Progress that times a plain pass after each phase of perplexity: before the first shot, and after each shot."""

    def __init__(self, source: str, tokens: CalibrationTokens) -> None:
        super().__init__()
        self._source, self._tokens = source, tokens
        self.plain: list[float] = []

    @contextlib.contextmanager
    def phase(self, description: str, total_tokens: int) -> Iterator[Phase]:
        """Show a phase, and time a plain pass after it if it was of perplexity."""
        with super().phase(description, total_tokens) as phase:
            yield phase
        if description.endswith(": perplexity"):
            # The model is loaded anew, so that it takes no memory from the shots.
            self.plain.append(plain_pass(load_model(self._source), self._tokens))


def rows(report: PruneReport, plain: list[float]) -> list[dict[str, Any]]:
    """Rows of the result, one per shot; the shot's plain pass is the mean of those before and after."""
    around = [statistics.mean(pair) for pair in itertools.pairwise(plain)]
    return [
        {
            "size": round(100 * (1 - shot.sparsity), 2),
            "perplexity": round(shot.perplexity.perplexity, 2) if shot.perplexity else None,
            "curvature_s": round(shot.seconds_of("curvature"), 1),
            "selection_s": round(shot.seconds_of("selection"), 1),
            "update_s": round(shot.seconds_of("update"), 1),
            "plain_pass_s": round(unit, 1),
            "curvature_to_plain_pass": round(shot.seconds_of("curvature") / unit, 2),
            "ratio_to_plain_pass": round(shot.seconds / unit, 2),
        }
        for shot, unit in zip(report.shots, around, strict=True)
    ]


def markdown(result: dict[str, Any]) -> str:
    """Table of the result, and its circumstances, as Markdown."""
    lines = [
        "# Five shots to 50 %, rows and columns, SmolLM2-135M",
        "",
        f"{result['date']}, {result['machine']}, torch {result['versions']['torch']}, transformers "
        f"{result['versions']['transformers']}. Command: `{result['command']}`",
        "",
        "| prunable weights | published code | goal | here | curvature s | selection s | update s | plain pass s | "
        "curvature x plain pass | shot x plain pass |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for number, row in enumerate(result["shots"]):
        lines.append(
            f"| {row['size']} % | {PUBLISHED[number]} | {GOAL[number]} | {row['perplexity']} | {row['curvature_s']} | "
            f"{row['selection_s']} | {row['update_s']} | {row['plain_pass_s']} | {row['curvature_to_plain_pass']} | "
            f"{row['ratio_to_plain_pass']} |"
        )
    speed, memory = result["speed"], result["memory"]
    plain = ", ".join(f"{seconds:.1f}" for seconds in result["plain_pass_s"])
    lines += [
        "",
        f"Dense perplexity {result['dense_perplexity']}. Plain forward and backward pass of the dense model over the "
        f"same tokens: {plain} s (before the first shot and after each); the column has the mean of the two around a "
        f"shot. Mean shot: **{result['mean_ratio']} times** the plain pass (published code: 5.5 times).",
        "",
        f"At 50 %: prefill {speed['prefill_ratio']:.2f} times and decoding {speed['decode_ratio']:.2f} times the dense "
        f"model's tokens per second (512-token prompt, batch 1, {speed['dense']['dtype']}); weight files "
        f"{_mib(result['weight_bytes'])} instead of {_mib(result['dense_weight_bytes'])}, parameters "
        f"{result['parameters']:,} instead of {result['dense_parameters']:,}.",
        "",
        f"Peak resident memory {_mib(memory['peak'])}; floor {_mib(memory['model'] + memory['factors'])} (model "
        f"{_mib(memory['model'])} + factors {_mib(memory['factors'])}).",
        "",
    ]
    return "\n".join(lines)


def command_of(arguments: argparse.Namespace) -> str:
    """Command line that gives the result again, with placeholders for the texts."""
    named = [] if arguments.name == NAME else ["--name", arguments.name]
    changes = [word for item in arguments.set for word in ("--set", item)]
    return " ".join(["python benchmarks/anchors.py CALIBRATION.txt EVALUATION.txt", *named, *changes])


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def touch_memory(size: int) -> None:
    """Have a child process write to ``size`` bytes, or to three quarters of what is available, and end."""
    size = min(size, psutil.virtual_memory().available * 3 // 4)
    subprocess.run([sys.executable, "-c", f"b'x' * {size}"], check=True)


def main() -> None:
    """Run the protocol and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--out", type=Path, default=Path("runs") / f"anchors-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    parser.add_argument("--name", default=NAME, help="name of the result files")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", help="change the recipe")
    arguments = parser.parse_args()
    changes = {k: yaml.safe_load(v) for k, _, v in (item.partition("=") for item in arguments.set)}
    options = PROTOCOL | {"calibration": arguments.calibration, "evaluation": arguments.evaluation} | changes
    config = PruneConfig.from_mapping(options)

    touch_memory(TOUCHED)
    keep_freed_memory()
    source = resolve_source("demo")
    tokenizer = load_tokenizer(source)
    tokens = sample_calibration(
        tokenizer, load_corpus(config.calibration[0]), config.samples, config.seq_len, config.seed
    )
    dense = load_model(source)
    # A first pass compiles kernels and allocates memory.
    plain_pass(dense, CalibrationTokens(tokens.input_ids[:2], None, {}))
    del dense
    between = Between(source, tokens)
    report = prune_checkpoint("demo", arguments.out, config, progress=between)
    shots = rows(report, between.plain)
    assert report.export is not None
    assert report.speed is not None
    assert report.dense_perplexity is not None
    result = {
        **circumstances(command_of(arguments)),
        "versions": report.versions,
        "config": {k: v for k, v in report.config.items() if k not in ("calibration", "evaluation")},
        "plain_pass_s": between.plain,
        "dense_perplexity": round(report.dense_perplexity.perplexity, 2),
        "shots": shots,
        "mean_ratio": round(statistics.mean(shot["ratio_to_plain_pass"] for shot in shots), 2),
        "speed": report.speed.model_dump(),
        "weight_bytes": report.export.weight_bytes,
        "dense_weight_bytes": report.export.dense_weight_bytes,
        "parameters": report.shots[-1].size.total,
        "dense_parameters": report.dense_size.total,
        "memory": report.memory.model_dump(),
    }
    write(arguments.name, result, markdown(result))


if __name__ == "__main__":
    main()
