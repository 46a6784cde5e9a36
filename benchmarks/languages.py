"""Compression for one language, measured on others, and how alike the masks are (paper, Table 10 and eq. 29).

Demo texts (Wikipedia) in English, French and Spanish; single weights, half of them removed.

    python benchmarks/languages.py [--shots N] [--samples N]

Writes benchmarks/results/languages.json, .md and .png.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from common import circumstances, figure, save, table, write
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon import PruneConfig, evaluate, prune
from llm_surgeon.evaluation.masks import mask_equivalence
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.loading import load_model, load_tokenizer, resolve_source
from llm_surgeon.models.matrix import core_of
from llm_surgeon.system.allocator import keep_freed_memory
from llm_surgeon.system.progress import RichProgress

LANGUAGES = {"en": "English", "fr": "French", "es": "Spanish"}
EVALUATION_TOKENS = 10_240


def zeros(model: PreTrainedModel) -> dict[str, Tensor]:
    """Removed weights per prunable layer, bool ``[R, C]``, True = removed."""
    anatomy = examine(model, family_of(model.config.model_type))
    return {name: core_of(model, layer).weight.detach() == 0 for name, layer in anatomy.layers.items()}


def perplexities(model: PreTrainedModel, tokenizer: Any) -> list[float]:
    """Perplexity on the held-out part of each language's text."""
    return [
        round(evaluate(model, tokenizer, f"demo:{code}", max_tokens=EVALUATION_TOKENS).perplexity, 2)
        for code in LANGUAGES
    ]


def draw(result: dict[str, Any]) -> None:
    """Draw two maps: perplexity by calibration and evaluation language, and equivalence of the masks."""
    picture = figure(10, 3.8)
    names = list(LANGUAGES.values())
    left, right = picture.subplots(1, 2)
    for axes, values, title, rows in (
        (left, [result["dense"], *result["perplexity"]], "Perplexity", ["dense", *names]),
        (right, result["mask_equivalence"], "Mask equivalence", names),
    ):
        numbers = np.array(values)
        # Colours compare within an evaluation language; dark is worse.
        shades = np.log(numbers / numbers.min(axis=0)) if axes is left else -numbers
        axes.imshow(shades, cmap="cividis_r")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(title)
        for (row, column), value in np.ndenumerate(numbers):
            axes.text(
                column, row, f"{value:.4g}", ha="center", va="center", bbox={"color": "white", "alpha": 0.7, "pad": 2}
            )
    left.set_xlabel("evaluated on")
    left.set_ylabel("calibrated on")
    save(picture, "languages", dpi=120)


def main() -> None:
    """Prune once per language, evaluate on all languages, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    keep_freed_memory()
    source = resolve_source("demo")
    tokenizer = load_tokenizer(source)
    dense = perplexities(load_model(source), tokenizer)
    measured, masks = [], []
    for code in LANGUAGES:
        model = load_model(source)
        options = {
            "preset": "none",
            "structure": "unstructured",
            "sparsity": 0.5,
            "evaluation": "none",
            "calibration": f"demo:{code}",
        }
        config = PruneConfig.from_mapping(options | vars(arguments))
        report = prune(model, tokenizer, config, progress=RichProgress(), source="demo")
        measured.append(perplexities(model, tokenizer))
        masks.append(zeros(model))
    command = f"python benchmarks/languages.py --shots {arguments.shots} --samples {arguments.samples}"
    result = circumstances(command) | {
        "versions": report.versions,
        "languages": list(LANGUAGES.values()),
        "dense": dense,
        "perplexity": measured,
        "mask_equivalence": [[round(mask_equivalence(x, y), 3) for y in masks] for x in masks],
    }
    write("languages", result, markdown(result))
    draw(result)


def markdown(result: dict[str, Any]) -> str:
    """Tables of perplexity and of mask equivalence, as Markdown."""
    names = result["languages"]
    first = table(
        ["calibrated on", *(f"perplexity {name}" for name in names)],
        [["dense", *result["dense"]], *([name, *row] for name, row in zip(names, result["perplexity"], strict=True))],
    )
    second = table(
        ["masks", *names], [[name, *row] for name, row in zip(names, result["mask_equivalence"], strict=True)]
    )
    return (
        "# Compression for one language, measured on others\n\nSmolLM2-135M-Instruct, half of the prunable weights "
        f"removed one by one; demo texts. {result['date']}, {result['machine']}. Command: `{result['command']}`\n\n"
        f"{first}\n\nMask equivalence, the share of removed weights in common (chance: 0.5):\n\n{second}\n"
    )


if __name__ == "__main__":
    main()
