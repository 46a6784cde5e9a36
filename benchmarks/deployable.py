"""Benchmark of the kinds of structure at the same size: perplexity, parameters, bytes and speed of the exports.

    python benchmarks/deployable.py CALIBRATION.txt EVALUATION.txt OUT [--only NAME ...]

Prunes the demo model in five shots to half its prunable weights, exports after the shots to 20, 30 and 50 %, and times
every export against the dense model in alternating pairs. OUT holds the exports; exports that are there are used again.
Writes benchmarks/results/deployable.json, .md and .png.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from common import COLOURS, PROTOCOL, circumstances, figure, finished, save, table, write

from llm_surgeon import PruneConfig, bench, prune_checkpoint
from llm_surgeon.records import PruneReport, ShotRecord
from llm_surgeon.system.progress import RichProgress

STRUCTURES: dict[str, dict[str, Any]] = {
    "rows-columns": {},
    "neurons+heads": {"structure": "neurons+heads"},
    "neurons+heads uniform": {"structure": "neurons+heads", "uniform": True},
    "blocks": {"structure": "blocks"},
    "neurons+heads+rows-columns": {"structure": "neurons+heads+rows-columns"},
}
SHOTS = (2, 3, 5)
PROMPT, GENERATED = 512, 32


def main() -> None:
    """Prune the missing exports, time all of them, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(STRUCTURES), choices=list(STRUCTURES))
    parser.add_argument("--untimed", action="store_true", help="prune only")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rows = finished("deployable").get("rows", {})
    for name in arguments.only:
        place = arguments.out / name.replace(" ", "-")
        if not place.exists():
            prune_demo(name, place, arguments.calibration, arguments.evaluation)
        if not arguments.untimed:
            rows[name] = measured(place)
            result = circumstances("python benchmarks/deployable.py CALIBRATION.txt EVALUATION.txt OUT")
            write("deployable", result | {"rows": rows}, markdown(rows, result))
            draw(rows)


def prune_demo(name: str, place: Path, calibration: str, evaluation: str) -> None:
    """Prune the demo model by one kind of structure, and export its shots."""
    texts = {"calibration": calibration, "evaluation": evaluation}
    config = PruneConfig.from_mapping({**PROTOCOL, **texts, **STRUCTURES[name], "export_shots": SHOTS[:-1]})
    prune_checkpoint("demo", place, config, progress=RichProgress(), command=f"({name})")


def measured(place: Path) -> dict[str, Any]:
    """Sizes, perplexities and speeds of the exports of a run."""
    report = PruneReport.model_validate_json((place / "report.json").read_text(encoding="utf8"))
    places = [place / f"shot-{shot}" for shot in SHOTS[:-1]] + [place]
    timed = bench(places, "demo", batches=(1,), prompt=PROMPT, generate=GENERATED, repeats=7)
    dense, *models = timed.models
    ratios = {run.timings[-1].model: (run.prefill_ratio, run.decode_ratio) for run in timed.runs}
    sizes = {}
    for shot, model in zip(SHOTS, models, strict=True):
        record: ShotRecord = report.shots[shot - 1]
        assert record.perplexity is not None
        sizes[f"{record.target_sparsity:.2f}"] = {
            "sparsity": record.sparsity,
            "perplexity": record.perplexity.perplexity,
            "parameters": model.own.parameters,
            "weight_bytes": model.own.weight_bytes,
            "prefill_ratio": ratios[model.name][0],
            "decode_ratio": ratios[model.name][1],
            "peak": model.own.peaks[1],
        }
    own = dense.own
    return {
        "dense": {"parameters": own.parameters, "weight_bytes": own.weight_bytes, "peak": own.peaks[1]},
        "sizes": sizes,
        "seconds": sum(shot.seconds for shot in report.shots),
        "plain": report.export.plain if report.export else False,
    }


def markdown(rows: dict[str, Any], where: dict[str, Any]) -> str:
    """Table of the result with one line for each structure and size, as Markdown."""
    lines = [
        (
            name,
            f"{100 * size['sparsity']:.1f} %",
            f"{size['perplexity']:.2f}",
            f"{size['parameters'] / 1e6:.1f} M",
            f"{size['weight_bytes'] / 2**20:.0f} MiB",
            f"{size['prefill_ratio']:.2f}",
            f"{size['decode_ratio']:.2f}",
            f"{size['peak'] / 2**20:.0f} MiB",
            "plain class" if row["plain"] else "modelling file",
        )
        for name, row in rows.items()
        for size in row["sizes"].values()
    ]
    heading = (
        *("structure", "removed", "perplexity", "parameters", "weight file"),
        *("prefill", "decoding", "peak", "loads as"),
    )
    dense = next(iter(rows.values()))["dense"]
    return (
        "# What the exports of each structure give\n\n"
        f"SmolLM2-135M-Instruct, float32: {dense['parameters'] / 1e6:.1f} M parameters, "
        f"{dense['weight_bytes'] / 2**20:.0f} MiB; dense perplexity 22.05. Five shots to 50 %, one per 10 %. "
        f"{where['date']}, {where['machine']}. Command: `{where['command']}`\n\n{table(heading, lines)}\n\n"
        "- Removed: share of the linear weights of the blocks; 20, 30 and 50 % were asked for, and large candidates "
        "may leave a part of them.\n"
        f"- Prefill of {PROMPT} tokens, decoding of {GENERATED} with the cache, batch 1: times as fast as dense, "
        "median of 7 alternating pairs.\n- Peak: resident memory of a process that loads the export and does both.\n"
    )


def draw(rows: dict[str, Any]) -> None:
    """Draw perplexity against prefill speed, one line for each structure."""
    picture = figure()
    axes = picture.subplots()
    for colour, (name, row) in zip(COLOURS, rows.items(), strict=False):
        sizes = row["sizes"].values()
        axes.plot(
            [size["prefill_ratio"] for size in sizes],
            [size["perplexity"] for size in sizes],
            marker="o",
            color=colour,
            label=name,
        )
    axes.axhline(22.05, color="0.4", linewidth=1, linestyle=":")
    axes.set_yscale("log")
    # Models of a higher perplexity are of no use.
    axes.set_ylim(20, 1000)
    axes.set_xlabel("prefill, times as fast as the dense model")
    axes.set_ylabel("perplexity (dotted: dense)")
    axes.legend(frameon=False)
    save(picture, "deployable", dpi=120)


if __name__ == "__main__":
    main()
