"""Studies of the method: variants of one recipe on the same tokens, each a table and a picture.

    python benchmarks/studies.py STUDY CALIBRATION.txt EVALUATION.txt [--only VARIANT ...]

Studies: structured (methods, rows and columns; paper, Table 1), unstructured and semistructured (methods, single
weights and 2:4), shots (Table 9), correlations and groups (independent against correlated updates, rows and columns
in five shots, single weights in one, with the time of the update by size of group), dampings (both, in both orders),
curvatures, steps (of one shot), ablation (of the presets, at 70 %), reconstruction, crossfitting, corrections, french
(by the demo text; the files named are not read).
Variants that are in the result already are not run again; remove the JSON file to start afresh. A variant whose recipe
another study has run is taken from there, times included. Writes benchmarks/results/STUDY.json, .md and .png.
The picture is for whoever runs the study: only those that a document shows are kept (benchmarks/results/.gitignore).
"""

from __future__ import annotations

import argparse
import re
import statistics
from typing import Any

from common import (
    COLOURS,
    PROTOCOL,
    circumstances,
    figure,
    finished,
    run,
    save,
    seconds_saved,
    share_dense_work,
    table,
    write,
)

from llm_surgeon import PruneConfig, PruneReport
from llm_surgeon.recipe.methods import METHODS
from llm_surgeon.report.plots import tick_perplexity
from llm_surgeon.system.allocator import keep_freed_memory

Variants = dict[str, dict[str, Any]]

ONE_SHOT = {"shots": 1}
# Two Kronecker products take a decomposition in float64 per layer, which takes long for the feed-forward layers.
ATTENTION = {"ignore": ("lm_head", r"mlp\..*")}


def dampings(structure: str, sparsity: float) -> Variants:
    """Variants of both dampings for one structure in one shot."""
    pairs = [(0.01, 0.1), (0.1, 0.01), (0.01, 0.01), (0.01, 0.5)]
    return {
        f"{structure}, A {a:g}, G {g:g}": ONE_SHOT
        | {"structure": structure, "sparsity": sparsity, "dampening_a": a, "dampening_g": g}
        for a, g in pairs
    }


def single_weights(structure: str) -> Variants:
    """Variants of all methods in five shots, and of this package's in one shot, with nothing but gates fitted."""
    one = ONE_SHOT | {"structure": structure}
    return (
        {name: {"method": name, "structure": structure} for name in METHODS}
        | {"surgeon, one shot": one}
        | {
            f"surgeon, one shot, 2 steps on gates{name}": one | {"gate_steps": 2} | options
            for name, options in GATE_DAMPINGS.items()
        }
        | {"surgeon, one shot, 4 steps on gates": one | {"gate_steps": 4}}
    )


# Gates as they were damped at first; without a damping their evidence sets it.
GATE_DAMPINGS = {"": {}, ", fixed damping": {"gate_damping": 0.5}}
TWO_STEPS_ON_GATES = {
    f"two steps on gates{name}": {"reconstruction": True, "gate_steps": 2} | options
    for name, options in GATE_DAMPINGS.items()
}
PHASES = ("curvature", "selection", "update", "reconstruction", "gates", "correction")
RECONSTRUCTIONS = {
    "without": {},
    "fitted to the calibration tokens": {"reconstruction": True, "reconstruction_copies": 0},
    "and to two copies": {"reconstruction": True},
} | {f"and {name}": options for name, options in TWO_STEPS_ON_GATES.items()}
# Updates of rows and of columns, each all together but without the other; with the ranking by raw cost they are those
# of the published code, but that what is removed by implication is counted at once all the same.
APART = {"max_correlations": 1_000_000}
PUBLISHED = APART | {"rank_by": "cost"}
# The same tokens, with as much context as the windows of the evaluation have.
PAIRS = {"samples": 16, "seq_len": 1024, "windows_per_sample": 2}
# Corrections as they were by default at first.
HALF_RATE = {"lora_learning_rate": 5e-4, "lora_final_steps": 64}
FRENCH = {"calibration": "demo:fr", "evaluation": "demo:fr"}
FRENCH_VARIANTS = {
    "ranking and update of the published code": PUBLISHED,
    "reconstruction": {"reconstruction": True},
} | {f"reconstruction, and {name}": options for name, options in TWO_STEPS_ON_GATES.items()}
CROSS_FITTED = ONE_SHOT | {"steps_per_shot": 2, "reconstruction": True, "cross_fit": True, "gate_steps": 4}
FAST = CROSS_FITTED | {"reconstruction_copies": 0, "gate_steps": 2}
# One part of the recipe after the other, from the published code's to the presets; then other choices of one of them.
TWO_STEPS = ONE_SHOT | {"steps_per_shot": 2}
PARTS = {
    "ranking and update of the published code": ONE_SHOT | PUBLISHED,
    "and rows and columns updated together": ONE_SHOT | {"rank_by": "cost"},
    "and ranked per weight freed": ONE_SHOT,
    "and in two steps": TWO_STEPS,
    "and reconstruction": TWO_STEPS | {"reconstruction": True, "reconstruction_copies": 0},
    "and two steps on gates, crosswise (fast)": FAST,
    "and copies, and four steps on gates (best)": CROSS_FITTED,
    "per weight, rows and columns updated apart": ONE_SHOT | APART,
    "per weight, each updated alone": ONE_SHOT | {"max_correlations": 1},
    "per weight, dampening_g 0.03": ONE_SHOT | {"dampening_g": 0.03},
    "per weight, dampening_g 0.3": ONE_SHOT | {"dampening_g": 0.3},
    "per weight, dampening_a 0.003": ONE_SHOT | {"dampening_a": 0.003},
    "per weight, dampening_a 0.03": ONE_SHOT | {"dampening_a": 0.03},
    "in four steps": ONE_SHOT | {"steps_per_shot": 4},
    "in two steps, gates by all of the text, no reconstruction": TWO_STEPS | {"gate_steps": 2},
    "in two steps, reconstruction, gates by all of the text": FAST | {"cross_fit": False},
    "in two steps, reconstruction with copies": TWO_STEPS | {"reconstruction": True},
}
# One gate for each side of a feed-forward part of the demo model.
WIDE = {"gate_width": 1536}
STUDIES: dict[str, tuple[str, Variants]] = {
    "structured": (
        "Methods, rows and columns, five shots to 50 %",
        {name: {"method": name} for name in METHODS}
        | {f"{name}, raw cost": {"method": name, "rank_by": "cost"} for name in METHODS},
    ),
    "unstructured": ("Methods, single weights, five shots to 50 %", single_weights("unstructured")),
    "semistructured": ("Methods, 2:4, five shots", single_weights("2:4")),
    "shots": (
        "Shots, rows and columns to 50 %",
        {f"{shots} shots" if shots > 1 else "1 shot": {"shots": shots} for shots in (1, 2, 5, 10, 20)},
    ),
    "steps": (
        "Steps of a shot, rows and columns to 50 %",
        {f"steps: {steps}": ONE_SHOT | {"steps_per_shot": steps} for steps in (1, 2, 4, 8)}
        | {
            f"steps: {steps}, reconstruction": ONE_SHOT | {"steps_per_shot": steps, "reconstruction": True}
            for steps in (2, 4)
        }
        | {
            f"steps: 2, reconstruction without copies{f', seed {seed}' if seed else ''}": ONE_SHOT
            | {"steps_per_shot": 2, "reconstruction": True, "reconstruction_copies": 0, "seed": seed}
            for seed in (0, 1, 2)
        }
        | {
            f"steps: 2, reconstruction without copies, {name}": ONE_SHOT
            | {"steps_per_shot": 2, "reconstruction_copies": 0}
            | options
            for name, options in TWO_STEPS_ON_GATES.items()
        }
        | {
            "two shots, steps: 2": {"shots": 2, "steps_per_shot": 2},
            "two shots, steps: 2, reconstruction": {"shots": 2, "steps_per_shot": 2, "reconstruction": True},
        },
    ),
    "correlations": (
        "Rows and columns, independent against correlated updates, five shots to 50 %",
        {
            "all together": {"max_correlations": 0},
            "groups of 16": {"max_correlations": 16},
            "each alone": {"max_correlations": 1},
        },
    ),
    "groups": (
        "Single weights, one shot to 50 %, by size of group",
        {
            ("all together" if not size else f"groups of {size}"): ONE_SHOT
            | {"structure": "unstructured", "max_correlations": size}
            for size in (0, 1, 16, 64, 256)
        }
        | {
            f"all together, {steps} steps": ONE_SHOT | {"structure": "unstructured", "update_steps": steps}
            for steps in (5, 10, 40)
        },
    ),
    "dampings": (
        "Dampings in both orders, one shot",
        dampings("rows-columns", 0.2) | dampings("unstructured", 0.5) | dampings("2:4", 0.5),
    ),
    "curvatures": (
        "Curvatures, rows and columns, one shot to 80 %",
        {
            name: ONE_SHOT | {"sparsity": 0.2, **options}
            for name, options in {
                "K-FAC, empirical Fisher": {},
                "K-FAC, true Fisher": {"fisher": "true"},
                "K-FAC, true Fisher, 4 samples": {"fisher": "true", "fisher_samples": 4},
                "nearest Kronecker product": {"curvature": "nearest-kronecker"},
                "K-OBD, K-FAC": {"method": "k-obd"},
                "K-OBD, exact diagonal": {"method": "k-obd", "curvature": "diagonal"},
                "attention only, K-FAC": ATTENTION,
                "attention only, sum of two products": ATTENTION | {"curvature": "kronecker-sum"},
            }.items()
        },
    ),
    "ablation": (
        "Parts of the recipe, rows and columns, one shot to 70 %",
        {
            f"{name}, seed {seed}": options | {"sparsity": 0.3, "seed": seed}
            for seed in (0, 1, 2)
            for name, options in PARTS.items()
        },
    ),
    "reconstruction": (
        "Reconstruction, rows and columns, five shots to 50 %",
        {
            f"{name}, seed {seed}": options | {"seed": seed}
            for name, options in RECONSTRUCTIONS.items()
            for seed in (0, 1, 2)
        }
        | {
            "and to two copies, ridge 1, two windows a sequence": PAIRS
            | {"reconstruction": True, "reconstruction_ridge": 1.0},
            "and to two copies, with corrections": {"reconstruction": True, "lora": True} | HALF_RATE,
        },
    ),
    "crossfitting": (
        "Cross-fitting, one shot to each size (rows and columns, but two lines)",
        {
            f"to {100 - removed} %{name}{how}, seed {seed}": CROSS_FITTED
            | options
            | damping
            | {"sparsity": removed / 100, "seed": seed}
            for how, damping in GATE_DAMPINGS.items()
            for name, options in {
                "": {},
                ", wide gates": WIDE,
                ", wide gates, pairs": WIDE | PAIRS,
            }.items()
            for seed in (0, 1, 2)
            for removed in (10, 20, 30, 40, 50)
        }
        | {
            f"to 50 %, preset fast{how}, seed {seed}": FAST | damping | {"seed": seed}
            for how, damping in GATE_DAMPINGS.items()
            for seed in (0, 1, 2)
        }
        | {
            f"to {100 - removed} %, preset fast, seed 0": FAST | {"sparsity": removed / 100}
            for removed in (10, 20, 30, 40, 70)
        }
        | {
            f"neurons and heads, to {100 - removed} %": CROSS_FITTED
            | {"structure": "neurons+heads", "sparsity": removed / 100}
            for removed in (20, 30, 50)
        }
        | {"to 30 %, seed 0": CROSS_FITTED | {"sparsity": 0.7}, "to 30 %, five shots": {"sparsity": 0.7}}
        | {
            f"to 50 %, wide gates, pairs, fixed damping, {name}": CROSS_FITTED
            | WIDE
            | PAIRS
            | GATE_DAMPINGS[", fixed damping"]
            | options
            for name, options in {
                "gates by all of the text": {"cross_fit": False},
                "with corrections": {"lora": True, "lora_batch_size": 1} | HALF_RATE,
                "preset fast": FAST,
            }.items()
        },
    ),
    "french": (
        "Rows and columns, calibrated and measured on French text",
        {
            f"{name}, seed {seed}": FRENCH | options | {"seed": seed}
            for seed in (0, 1, 2)
            for name, options in FRENCH_VARIANTS.items()
        }
        | {
            f"one shot to {100 - removed} %, fitted crosswise{name}{how}, seed {seed}": FRENCH
            | CROSS_FITTED
            | options
            | damping
            | {"sparsity": removed / 100, "seed": seed}
            for how, damping in GATE_DAMPINGS.items()
            for name, options in {"": {}, ", wide gates": WIDE}.items()
            for seed in (0, 1, 2)
            for removed in (10, 20, 30, 40, 50)
        },
    ),
    "corrections": (
        "First-order corrections: rows and columns in five shots, single weights in one, to 50 %",
        {
            f"{structure}, {'with' if lora else 'without'} corrections": options
            | {"structure": structure, "lora": lora}
            for structure, options in (("rows-columns", {}), ("unstructured", ONE_SHOT))
            for lora in (False, True)
        }
        | {
            f"rows-columns, with corrections, {name}": {"lora": True} | options
            for name, options in {
                "seed 1": {"seed": 1},
                "seed 2": {"seed": 2},
                "64 steps at the end": {"lora_final_steps": 64},
                "half the rate, 40 steps at the end": HALF_RATE | {"lora_final_steps": 40},
                "half the rate, 64 steps at the end": HALF_RATE,
                "half the rate, 128 steps at the end": HALF_RATE | {"lora_final_steps": 128},
                "half the rate, 64 steps at the end, two windows a sequence": HALF_RATE
                | PAIRS
                | {"lora_batch_size": 1},
            }.items()
        }
        | {
            "unstructured, with corrections, half the rate, 64 steps at the end": ONE_SHOT
            | {"structure": "unstructured", "lora": True}
            | HALF_RATE
        },
    ),
}


def record(report: PruneReport) -> dict[str, Any]:
    """Numbers of the last run for the table; curvature that an earlier run estimated counts here too."""
    return {
        "size": [round(100 * (1 - shot.sparsity), 2) for shot in report.shots],
        "perplexity": [round(shot.perplexity.perplexity, 2) for shot in report.shots if shot.perplexity],
        "curvature_s": [round(shot.seconds_of("curvature") + seconds_saved(), 1) for shot in report.shots],
        "selection_s": [round(shot.seconds_of("selection"), 1) for shot in report.shots],
        "update_s": [round(shot.seconds_of("update"), 1) for shot in report.shots],
        "reconstruction_s": [round(shot.seconds_of("reconstruction"), 1) for shot in report.shots],
        "gates_s": [round(shot.seconds_of("gates"), 1) for shot in report.shots],
        "correction_s": [round(shot.seconds_of("correction"), 1) for shot in report.shots],
        "peak_mib": round(report.memory.peak / 2**20),
        "versions": report.versions,
    }


def measured(options: dict[str, Any], texts: dict[str, str]) -> tuple[dict[str, Any], float]:
    """Record and dense perplexity of a variant, from any study that has run the same recipe, or else from a run."""
    recipe = PruneConfig.from_mapping(PROTOCOL | options)
    for study in STUDIES:
        result = finished(study)
        for variant, item in result.get("variants", {}).items():
            # Early results were written when there was no default preset.
            options_then = {"preset": "none"} | result["protocol"] | result["options"][variant]
            if PruneConfig.from_mapping(options_then) == recipe:
                return item, result["dense_perplexity"]
    report = run(PROTOCOL | texts | options)
    assert report.dense_perplexity is not None
    return record(report), round(report.dense_perplexity.perplexity, 2)


def markdown(title: str, result: dict[str, Any]) -> str:
    """Table with a row per variant: perplexity after each shot, mean seconds by phase, and the update's share."""
    variants = result["variants"]
    sizes = sorted({size for item in variants.values() for size in _tens(item)}, reverse=True)
    rows = []
    for name, item in variants.items():
        at = _tens(item)
        # Results from before a phase existed have no seconds of it.
        phases = [item.get(f"{phase}_s", [0.0]) for phase in PHASES]
        means = [sum(phase) / len(phase) for phase in phases]
        share = f"{100 * means[2] / sum(means):.0f} %"
        rows.append([name, *(at.get(size) for size in sizes), *(f"{mean:.1f}" for mean in means), share])
    note = f" {result['note']}" if "note" in result else ""
    heading = ["", *(f"{size} %" for size in sizes), *(f"{phase} s" for phase in PHASES), "update"]
    return (
        f"# {title}\n\nSmolLM2-135M-Instruct, perplexity at each size (prunable weights kept; dense "
        f"{result['dense_perplexity']}), mean seconds of a shot by phase, and the update's share of them. Variants of "
        "one shot share one curvature estimate in a process, whose time is given for each. "
        f"{result['date']}, {result['machine']}. Command: `{result['command']}`.{note}\n\n"
        f"{table(heading, rows)}\n{_spread(variants, sizes)}"
    )


def _spread(variants: dict[str, Any], sizes: list[int]) -> str:
    """Table of mean and standard deviation at each size, for variants that were run with several seeds."""
    rows = []
    for name, members in _seeds(variants).items():
        found = [[at[size] for at in map(_tens, members) if size in at] for size in sizes]
        if max(map(len, found)) > 1:
            rows.append([name, max(map(len, found)), *map(_mean, found)])
    if not rows:
        return ""
    heading = ["", "seeds", *(f"{size} %" for size in sizes)]
    return f"\nMean over seeds (standard deviation):\n\n{table(heading, rows)}\n"


def _mean(values: list[float]) -> str | None:
    if not values:
        return None
    spread = f" ({statistics.stdev(values):.2f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _seeds(variants: dict[str, Any]) -> dict[str, list[Any]]:
    """Group variants that differ only in their seed, by name without the seed."""
    groups: dict[str, list[Any]] = {}
    for name, item in variants.items():
        groups.setdefault(re.sub(r", seed \d+$", "", name), []).append(item)
    return groups


def _tens(item: dict[str, Any]) -> dict[int, float]:
    """Perplexity at sizes that are multiples of 10 %; the picture has all sizes."""
    pairs = zip(item["size"], item["perplexity"], strict=True)
    return {round(size): value for size, value in pairs if abs(size - 10 * round(size / 10)) < 0.5}


def draw(name: str, title: str, result: dict[str, Any]) -> None:
    """Draw perplexity against size if half of the variants have several sizes, else a row of points per variant."""
    variants = result["variants"]
    lines = 2 * sum(len(item["size"]) > 1 for item in variants.values()) >= len(variants)
    rows = _seeds(variants)
    # Names of lines stand below the axes, where they cover none.
    picture = figure(height=4.6 + 0.2 * len(variants) if lines else max(4.6, 1.4 + 0.22 * len(rows)))
    axes = picture.subplots()
    if lines:
        value_axis = axes.yaxis
        for number, (label, item) in enumerate(variants.items()):
            style = {"marker": "o", "linestyle": "--" if number >= len(COLOURS) else "-"}
            axes.plot(item["size"], item["perplexity"], color=COLOURS[number % len(COLOURS)], label=label, **style)
        axes.invert_xaxis()
        axes.set_xlabel("prunable weights kept (%)")
        axes.set_yscale("log")
        picture.legend(frameon=False, loc="outside lower left")
    else:
        value_axis = axes.xaxis
        axes.axvline(result["dense_perplexity"], color=COLOURS[1], linestyle="--", label="dense")
        for row, members in rows.items():
            values = [item["perplexity"][-1] for item in members]
            axes.plot(values, [row] * len(values), "o", color=COLOURS[0], alpha=0.7)
            label = f"{statistics.mean(values):.4g}"
            axes.annotate(label, (max(values), row), (7, 0), textcoords="offset points", va="center")
        axes.set_xscale("log")
        axes.margins(x=0.25)
        axes.invert_yaxis()
        axes.legend(frameon=False)
    tick_perplexity(value_axis, [value for item in variants.values() for value in item["perplexity"]])
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    # Over the whole picture: long names leave the axes too little room for it.
    picture.suptitle(title)
    save(picture, name, dpi=120)


def main() -> None:
    """Run the missing variants of a study, and write the result after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="run these variants only")
    arguments = parser.parse_args()
    keep_freed_memory()
    share_dense_work()
    name = arguments.study
    title, variants = STUDIES[name]
    earlier = finished(name)
    before = earlier.get("variants", {})
    texts = {"calibration": arguments.calibration, "evaluation": arguments.evaluation}
    for variant, options in variants.items():
        if variant in before or (arguments.only and variant not in arguments.only):
            continue
        before[variant], dense_perplexity = measured(options, texts)
        result = circumstances(f"python benchmarks/studies.py {name} CALIBRATION.txt EVALUATION.txt") | {
            "protocol": PROTOCOL,
            "options": {known: variants[known] for known in variants if known in before},
            "dense_perplexity": dense_perplexity,
            "variants": {known: before[known] for known in variants if known in before},
        }
        if "note" in earlier:
            result["note"] = earlier["note"]
        write(name, result, markdown(title, result))
        draw(name, title, result)


if __name__ == "__main__":
    main()
