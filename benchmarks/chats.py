"""Calibration on prose, on chats and on both: perplexity of each, and ten factual questions.

    python benchmarks/chats.py MODEL CALIBRATION.txt EVALUATION.txt --out DIR --sparsity 0.2

MODEL is a chat model. It writes the chats itself (`llm-surgeon chats`); those of the last sixth are to evaluate on. The
default preset prunes on prose, on chats, and on both with equal shares, with as many sequences in each run. A question
counts as answered if the likeliest answer holds the fact. Runs that are finished in DIR are not made again.
Writes benchmarks/results/chats.json and chats.md.
"""

from __future__ import annotations

import argparse
import gc
import re
from pathlib import Path
from typing import Any

from common import circumstances, table, write

from llm_surgeon import PruneReport, prune_checkpoint, sample, write_chats
from llm_surgeon.records import Perplexity, Samples
from llm_surgeon.system.progress import RichProgress

HELD_OUT = 6
# Questions, and what a right answer holds.
FACTS = {
    "What is the capital of France?": "Paris",
    "What is the capital of Japan?": "Tokyo",
    "Which planet is the largest of the solar system?": "Jupiter",
    "How many days does a week have?": r"\b7\b|seven",
    "What is the chemical formula of water?": r"H2O|H₂O|H_2O",
    "Who wrote Romeo and Juliet?": "Shakespeare",
    "In which country are the pyramids of Giza?": "Egypt",
    "What is two plus three?": r"\b5\b|five",
    "Which ocean lies between Europe and North America?": "Atlantic",
    "What do bees make from nectar?": "honey",
}


def split_chats(chats: Path, directory: Path) -> tuple[Path, Path]:
    """Write the chats to calibrate on and those to evaluate on to files of their own."""
    lines = chats.read_text(encoding="utf8").splitlines(keepends=True)
    cut = len(lines) - len(lines) // HELD_OUT
    parts = directory / "chats-calibration.jsonl", directory / "chats-evaluation.jsonl"
    for path, some in zip(parts, (lines[:cut], lines[cut:]), strict=True):
        path.write_text("".join(some), encoding="utf8")
    return parts


def run(name: str, calibration: list[str], texts: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Prune on some texts, and measure perplexities and answers; a finished run is read."""
    out = arguments.out / name
    if not (out / "report.json").exists():
        prune_checkpoint(
            arguments.model,
            out,
            calibration=calibration,
            evaluation=texts,
            sparsity=arguments.sparsity,
            structure=arguments.structure,
            samples=arguments.samples,
            seq_len=512,
            eval_window=512,
            eval_tokens=arguments.eval_tokens,
            device=arguments.device,
            progress=RichProgress(),
        )
    report = PruneReport.model_validate_json((out / "report.json").read_text(encoding="utf8"))
    last, dense = report.shots[-1].perplexity, report.dense_perplexity
    assert last is not None
    assert dense is not None
    return {"dense": _by_text(dense), name: _by_text(last)} | {"answers": right(out, arguments.device)}


def _by_text(measured: Perplexity) -> list[float]:
    return [text.perplexity for text in measured.sources]


def right(model: Path | str, device: str) -> int:
    """Number of the questions that a model answers with the fact."""
    found: Samples = sample(model, prompts=[*FACTS], chat=True, tokens=32, device=device).models[0]
    gc.collect()
    return sum(
        re.search(fact, made.greedy, re.IGNORECASE) is not None
        for fact, made in zip(FACTS.values(), found.continuations, strict=True)
    )


def markdown(result: dict[str, Any]) -> str:
    """Table of the runs, as Markdown."""
    best = [min(row["perplexities"][text] for row in result["rows"][1:]) for text in (0, 1)]
    rows = [
        (
            row["name"],
            *(f"{value:.2f}" for value in row["perplexities"]),
            *(
                "-" if row["name"] == "dense" else f"{100 * (value / least - 1):+.1f} %"
                for value, least in zip(row["perplexities"], best, strict=True)
            ),
            f"{row['answers']} of {len(FACTS)}",
        )
        for row in result["rows"]
    ]
    header = ("calibrated on", "prose", "chats", "prose to the best", "chats to the best", "questions")
    return f"""\
# Prose, chats, or both to calibrate on

{result["date"]}, {result["machine"]}, {result["threads"]} threads. Command: `{result["command"]}`

Perplexities in windows of 512 tokens: of prose that nobody calibrated on, and of chats that the dense model wrote
(`llm-surgeon chats`, {result["chats"]} rows, of which the last sixth is to evaluate on).
{100 * result["sparsity"]:.0f} % of the blocks' linear weights are removed ({result["structure"]}, default preset,
{result["samples"]} sequences of 512 tokens in every run). Questions: facts in the likeliest answer of 32 tokens, by the
chat template.

{table(header, rows)}
"""


def main() -> None:
    """Make all runs, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--structure", default="rows-columns")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chats = arguments.out / "chats.jsonl"
    if not chats.exists():
        write_chats(arguments.model, chats, rows=arguments.rows, device=arguments.device, progress=RichProgress())
    own, held_out = map(str, split_chats(chats, arguments.out))
    prose, texts = str(arguments.calibration), [str(arguments.evaluation), held_out]
    given = {"prose": [prose], "chats": [own], "both": [f"{prose}:1", f"{own}:1"]}
    found = {name: run(name, calibration, texts, arguments) for name, calibration in given.items()}
    rows = [
        {"name": "dense", "perplexities": found["prose"]["dense"], "answers": right(arguments.model, arguments.device)}
    ]
    rows += [{"name": name, "perplexities": one[name], "answers": one["answers"]} for name, one in found.items()]
    command = f"python benchmarks/chats.py {Path(arguments.model).name} {arguments.calibration.name}"
    command += f" {arguments.evaluation.name} --out DIR --sparsity {arguments.sparsity} --samples {arguments.samples}"
    result = circumstances(f"{command} --rows {arguments.rows}")
    result |= {name: getattr(arguments, name) for name in ("sparsity", "structure", "samples")}
    result |= {"chats": arguments.rows, "rows": rows}
    write("chats", result, markdown(result))


if __name__ == "__main__":
    main()
