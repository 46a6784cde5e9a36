"""Perplexity by tokens of recovery: distilled from the dense model, on text alone, and from random weights.

    python benchmarks/recovery.py MODEL CALIBRATION.txt EVALUATION.txt --out DIR --kept 0.5 --tokens 1M

MODEL is pruned by the default preset on CALIBRATION.txt. What is left is trained on that text and the demo's English
text in equal parts, and perplexity is that of EVALUATION.txt, on which nothing is fitted. From random weights, a model
of the same shapes is distilled: the difference is what pruning has kept. Finished runs in DIR are not made again, and
are in the tables too; interrupted ones go on. Writes benchmarks/results/recovery.json and recovery.md.
"""

from __future__ import annotations

import argparse
import itertools
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


def run(arguments: argparse.Namespace, tokens: str, kept: float, way: str) -> None:
    """Train what is left of a size in one way; a finished training is not made again."""
    export, out = pruned(arguments, kept), arguments.out / f"kept-{100 * kept:.0f}-{way}-{tokens}"
    if (out / "recovery.json").exists():
        return
    recover(
        randomised(export) if way == "scratch" else export,
        out,
        teacher=None if way == "text" else arguments.model,
        data=[str(arguments.calibration), "demo:en"],
        evaluation=str(arguments.evaluation),
        tokens=tokens,
        learning_rate=arguments.learning_rate,
        device=arguments.device,
        progress=RichProgress(),
    )


def measured(out: Path) -> dict[str, Any]:
    """Figures of a finished training."""
    export, way, tokens = out.name.rsplit("-", 2)
    record = RecoveryRecord.model_validate_json((out / "recovery.json").read_bytes())
    report = PruneReport.model_validate_json((out.with_name(export) / "report.json").read_bytes())
    return {
        "kept": report.shots[-1].size.prunable / report.dense_size.prunable,
        "dense": report.dense_perplexity.perplexity if report.dense_perplexity else None,
        "way": way,
        "tokens": tokens,
        "points": [(point.tokens, point.perplexity.perplexity) for point in record.curves.points],
        "passes": [use.passes for use in record.sources],
        "seconds": record.seconds,
        "peak": record.peak_memory,
        "learning_rate": record.config["learning_rate"],
    }


def of_tokens(rows: list[dict[str, Any]]) -> str:
    """Table of the runs of as many tokens, as Markdown."""
    cells = [
        (
            f"{100 * row['kept']:.0f} %",
            WAYS[row["way"]],
            *(f"{value:.2f}" for _, value in row["points"]),
            f"{100 * (min(value for _, value in row['points']) / row['points'][0][1] - 1):+.1f} %",
            f"{row['seconds'] / 60:.0f} min",
            f"{row['peak'] / 2**30:.1f} GiB",
        )
        for row in rows
    ]
    first, second = rows[0]["passes"]
    header = ("kept", "learns", *(f"{count:,}" for count, _ in rows[0]["points"]), "best", "time", "peak")
    return f"""\
## {rows[0]["tokens"]} tokens

The calibration text was read {first:.1f} times, the demo's English text {second:.1f} times; highest learning rate
{rows[0]["learning_rate"]:.0e}.

{table(header, cells)}
"""


def markdown(result: dict[str, Any]) -> str:
    """Tables of the runs, as Markdown."""
    counts = dict.fromkeys(row["tokens"] for row in result["rows"])
    tables = [of_tokens([row for row in result["rows"] if row["tokens"] == count]) for count in counts]
    return f"""\
# Recovery: perplexity by tokens of training

{result["date"]}, {result["machine"]}, {result["threads"]} threads. Command: `{result["command"]}`

The default preset leaves the share of the blocks' linear weights; the dense model has {result["rows"][0]["dense"]:.2f}.
Trained on the calibration text and the demo's English text in equal parts, 8 sequences of 512 tokens a step. Perplexity
of the development text, on which nothing is fitted. Times are of one run, which may have had other work beside it. The
tables have all finished runs of DIR; a row is made by the command with its own `--kept`, `--ways` and `--tokens`.

{chr(10).join(tables)}"""


def main() -> None:
    """Make all runs, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kept", type=float, nargs="+", default=[0.8, 0.5, 0.3])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--tokens", nargs="+", default=["1M"])
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = f"python benchmarks/recovery.py {Path(arguments.model).name} {arguments.calibration.name}"
    command += f" {arguments.evaluation.name} --out DIR --kept {' '.join(f'{kept:g}' for kept in arguments.kept)}"
    command += f" --ways {' '.join(arguments.ways)} --tokens {' '.join(arguments.tokens)}"
    result = circumstances(f"{command} --learning-rate {arguments.learning_rate:g}")
    cells = itertools.product(arguments.tokens, arguments.kept, arguments.ways)
    for cell in cells:
        run(arguments, *cell)
    result["rows"] = [measured(path.parent) for path in sorted(arguments.out.glob("kept-*-*-*/recovery.json"))]
    write("recovery", result, markdown(result))


if __name__ == "__main__":
    main()
