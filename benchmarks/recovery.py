"""Perplexity by tokens of recovery: distilled from the dense model, on text alone, and from random weights.

    python benchmarks/recovery.py MODEL CALIBRATION.txt EVALUATION.txt --out DIR --kept 0.5 --tokens 1M

MODEL is pruned by the default preset on CALIBRATION.txt. What is left is trained on that text and the demo's English
text in equal parts, and perplexity is that of EVALUATION.txt, on which nothing is fitted. From random weights, a model
of the same shapes is distilled: the difference is what pruning has kept. Finished runs in DIR are read, and interrupted
ones go on. Writes benchmarks/results/recovery.json and recovery.md.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from common import circumstances, table, write

from llm_surgeon import PruneReport, RecoveryRecord, load, prune_checkpoint, recover
from llm_surgeon.system.progress import RichProgress

WAYS = {
    "distilled": "the dense model's predictions",
    "text": "text alone",
    "scratch": "its predictions, random weights",
}


def pruned(arguments: argparse.Namespace, kept: float) -> Path:
    """The export of a size; a finished one is taken."""
    out: Path = arguments.out / f"kept-{100 * kept:.0f}"
    if not (out / "report.json").exists():
        prune_checkpoint(
            arguments.model,
            out,
            sparsity=1 - kept,
            calibration=str(arguments.calibration),
            evaluation=str(arguments.evaluation),
            samples=32,
            device=arguments.device,
            progress=RichProgress(),
        )
    return out


def randomised(export: Path) -> Path:
    """A copy of an export whose matrices are random, as small as at the beginning of a training."""
    out = export.with_name(f"{export.name}-random")
    if not out.exists():
        model, _ = load(export, device="cpu")
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        beside = out.with_name(f"{out.name}.partial")
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(export, beside)
        model.save_pretrained(beside)
        shutil.copyfile(export / "config.json", beside / "config.json")
        beside.rename(out)
    return out


def run(arguments: argparse.Namespace, kept: float, way: str) -> dict[str, Any]:
    """Train what is left of a size in one way."""
    export, out = pruned(arguments, kept), arguments.out / f"kept-{100 * kept:.0f}-{way}-{arguments.tokens}"
    if (out / "recovery.json").exists():
        record = RecoveryRecord.model_validate_json((out / "recovery.json").read_bytes())
    else:
        record = recover(
            randomised(export) if way == "scratch" else export,
            out,
            teacher=None if way == "text" else arguments.model,
            data=[str(arguments.calibration), "demo:en"],
            evaluation=str(arguments.evaluation),
            tokens=arguments.tokens,
            learning_rate=arguments.learning_rate,
            device=arguments.device,
            progress=RichProgress(),
        )
    report = PruneReport.model_validate_json((export / "report.json").read_bytes())
    points = [(point.tokens, point.perplexity.perplexity) for point in record.curves.points]
    return {
        "kept": report.shots[-1].size.prunable / report.dense_size.prunable,
        "dense": report.dense_perplexity.perplexity if report.dense_perplexity else None,
        "way": way,
        "points": points,
        "passes": [use.passes for use in record.sources],
        "seconds": record.seconds,
        "peak": record.peak_memory,
        "learning_rate": record.config["learning_rate"],
    }


def markdown(result: dict[str, Any]) -> str:
    """Table of the runs, as Markdown."""
    tokens = [count for count, _ in result["rows"][0]["points"]]
    rows = [
        (
            f"{100 * row['kept']:.0f} %",
            WAYS[row["way"]],
            *(f"{value:.2f}" for _, value in row["points"]),
            f"{100 * (min(value for _, value in row['points']) / row['points'][0][1] - 1):+.1f} %",
            f"{row['seconds'] / 60:.0f} min",
            f"{row['peak'] / 2**30:.1f} GiB",
        )
        for row in result["rows"]
    ]
    row = result["rows"][0]
    first, second = row["passes"]
    header = ("kept", "learns", *(f"{count:,}" for count in tokens), "best", "time", "peak")
    return f"""\
# Recovery: perplexity by tokens of training

{result["date"]}, {result["machine"]}, {result["threads"]} threads. Command: `{result["command"]}`

The default preset leaves the share of the blocks' linear weights; the dense model has {row["dense"]:.2f}. Trained on
the calibration text and the demo's English text in equal parts (read {first:.1f} and {second:.1f} times), 8 sequences
of 512 tokens a step, highest learning rate {row["learning_rate"]:.0e}. Perplexity of the development text, on which
nothing is fitted.

{table(header, rows)}
"""


def main() -> None:
    """Make all runs, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.5, 0.3])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--tokens", default="1M")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/recovery.py {Path(arguments.model).name} {arguments.calibration.name}"
    command += f" {arguments.evaluation.name} --out DIR --kept {' '.join(f'{kept:g}' for kept in arguments.kept)}"
    command += f" --ways {' '.join(arguments.ways)} --tokens {arguments.tokens}"
    result = circumstances(f"{command} --learning-rate {arguments.learning_rate:g}")
    rows = [run(arguments, kept, way) for kept in arguments.kept for way in arguments.ways]
    result["rows"] = rows
    write("recovery", result, markdown(result))


if __name__ == "__main__":
    main()
