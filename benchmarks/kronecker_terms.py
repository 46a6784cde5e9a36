"""Error of one, two and three Kronecker products as approximations of a layer's exact Fisher (paper, Fig. 5).

The root mean square error over all elements of the Fisher, in units of the Fisher's own root mean square, for K-FAC
and for the nearest sums, on layers of the demo model; exact, by inner products, without forming the Fisher.

    python benchmarks/kronecker_terms.py CALIBRATION.txt [--tokens N]

Writes benchmarks/results/kronecker_terms.json, .md and .png.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import COLOURS, circumstances, figure, save, table, write
from torch import Tensor

from llm_surgeon.curvature import Estimation
from llm_surgeon.data.corpora import load_corpus
from llm_surgeon.data.tokens import sample_calibration
from llm_surgeon.mathematics.nearest_kronecker import fisher_rmse, nearest_kronecker_sum
from llm_surgeon.models.loading import load_model, load_tokenizer, resolve_source
from llm_surgeon.passes.batch_major import run_pass
from llm_surgeon.passes.hooks import Hooks

LAYERS = ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
BLOCKS = (0, 14, 29)
LENGTH = 256


def samples(arguments: argparse.Namespace, labels: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Collect inputs and output gradients of all labelled tokens, per layer."""
    source = resolve_source("demo")
    model = load_model(source)
    corpus = load_corpus(arguments.calibration)
    tokens = sample_calibration(load_tokenizer(source), corpus, arguments.tokens // LENGTH, LENGTH, 0)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    with Hooks() as hooks:
        for block in BLOCKS:
            for kind in LAYERS:
                name = f"model.layers.{block}.{kind}"
                parts[name] = []
                hooks.on_pair(model.get_submodule(name), lambda a, g, found=parts[name]: found.append((a, g)))
        how = Estimation(batch_size=1, precision="float32", sampled_labels=labels)
        run_pass(model, hooks, tokens, how, backward=True, advance=lambda _tokens: None)
    return {
        name: (torch.cat([a for a, _ in found]).double(), torch.cat([g for _, g in found]).double())
        for name, found in parts.items()
    }


def relative_errors(a: Tensor, g: Tensor) -> dict[str, float]:
    """Errors of all approximations in units of the Fisher's root mean square."""
    unit = fisher_rmse(a, g, [])
    kfac = [(g.T @ g / len(g), a.T @ a / len(a))]
    terms = nearest_kronecker_sum(a, g, 3, 8)
    sums = {f"{count} term{'s' if count > 1 else ''}": fisher_rmse(a, g, terms[:count]) / unit for count in (1, 2, 3)}
    return {"K-FAC": fisher_rmse(a, g, kfac) / unit} | sums


def main() -> None:
    """Measure the errors for the empirical and the true Fisher (one sampled label per token), and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    errors = {
        fisher: {
            name.removeprefix("model.layers."): {key: round(value, 4) for key, value in relative_errors(a, g).items()}
            for name, (a, g) in samples(arguments, labels).items()
        }
        for fisher, labels in (("empirical", 0), ("true", 1))
    }
    command = f"python benchmarks/kronecker_terms.py CALIBRATION.txt --tokens {arguments.tokens}"
    result: dict[str, Any] = circumstances(command) | {"versions": {"torch": torch.__version__}, "errors": errors}
    kinds = ("K-FAC", "1 term", "2 terms", "3 terms")
    rows = [
        [f"{layer}, {fisher}", *(f"{values[kind]:.3f}" for kind in kinds)]
        for fisher, layers in errors.items()
        for layer, values in layers.items()
    ]
    write(
        "kronecker_terms",
        result,
        "# Error of sums of Kronecker products\n\nRoot mean square error over the elements of the exact Fisher, in "
        f"units of its own root mean square; SmolLM2-135M-Instruct, {arguments.tokens} tokens, eight power iterations "
        f"a term. {result['date']}. Command: `{command}`\n\n{table(['layer, labels', *kinds], rows)}\n",
    )
    draw(errors, kinds)


def draw(errors: dict[str, Any], kinds: tuple[str, ...]) -> None:
    """Draw bars by layer, one panel per kind of label."""
    picture = figure(11, 4.2)
    for axes, (fisher, layers) in zip(picture.subplots(1, 2, sharey=True), errors.items(), strict=True):
        for number, kind in enumerate(kinds):
            places = [place + 0.2 * (number - 1.5) for place in range(len(layers))]
            axes.bar(places, [values[kind] for values in layers.values()], 0.18, color=COLOURS[number], label=kind)
        axes.set_xticks(range(len(layers)), list(layers), rotation=40, ha="right")
        axes.set_title(f"{fisher} Fisher")
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
    picture.axes[0].set_ylabel("relative error")
    picture.axes[0].legend(frameon=False)
    save(picture, "kronecker_terms", dpi=120)


if __name__ == "__main__":
    main()
