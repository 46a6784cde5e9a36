"""Recipes to run in several processes and in one: ``torchrun ... tests/several.py TEXT FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

import tiny
from llm_surgeon import PruneConfig, prune

# Seven sequences in batches of two: no number of processes gets equal parts, nor batches of the same sequences.
COMMON = {
    "samples": 7, "seq_len": 32, "batch_size": 2, "eval_window": 64, "eval_tokens": 512,
    "preset": "none", "precision": "float32", "sparsity": 0.4,
}  # fmt: skip
# Name: model, and options. Conjugate gradients that stop at a tolerance may take another step after any rounding, a
# smaller batch size included; so few steps are always taken.
RECIPES = {
    "kfac": ("llama-biased", {"shots": 3}),
    "layer by layer": ("llama-biased", {"shots": 2, "order": "layer-major"}),
    "kfac, some gradients": ("llama", {"shots": 2, "gradient_share": 0.4}),
    "kfac, one by one": ("llama", {"shots": 1, "max_correlations": 1}),
    "neurons and heads": ("llama", {"shots": 2, "structure": "neurons+heads", "round_to": 4}),
    "unstructured": ("llama-biased", {"shots": 2, "structure": "unstructured", "sparsity": 0.6, "update_steps": 3}),
    "2:4, true Fisher": (
        "llama",
        {"shots": 2, "structure": "2:4", "fisher": "true", "fisher_samples": 2, "update_steps": 3},
    ),
    "diagonal": ("llama", {"shots": 2, "method": "k-obd", "curvature": "diagonal"}),
    "nearest product": ("llama-biased", {"shots": 2, "curvature": "nearest-kronecker"}),
    "nearest sum": ("llama", {"shots": 2, "curvature": "kronecker-sum"}),
    "inputs only": ("opt", {"shots": 1, "method": "obs-activations"}),
    "no curvature": ("llama", {"shots": 1, "method": "magnitude", "structure": "rows-columns"}),
    "sparsegpt, permuted": ("llama", {"method": "sparsegpt", "structure": "2:4", "permute": True, "sparsity": 0.5}),
    "global scores": ("llama", {"method": "wanda", "scope": "global", "structure": "unstructured"}),
    "refined, owl": ("llama", {"method": "ria", "refine": "r2-dsnot", "layer_budget": "owl", "owl_multiple": 2.0}),
    "reconstruction": ("llama-biased", {"shots": 2, "reconstruction": True}),
    "gates": ("llama-biased", {"shots": 2, "gate_steps": 2}),
    "cross-fitting": ("llama", {"shots": 2, "reconstruction": True, "gate_steps": 1, "cross_fit": True}),
    "corrections": ("llama", {"shots": 2, "lora": True, "lora_steps": 2, "lora_final_steps": 3, "lora_rank": 2}),
}


def run(name: str, text: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights and indices of the result, and the perplexities of the dense model and after each shot."""
    family, options = RECIPES[name]
    model = tiny.build(family)
    report = prune(model, tiny.tokenizer(), PruneConfig.from_mapping({**COMMON, **options, "calibration": text}))
    measured = [report.dense_perplexity, *(shot.perplexity for shot in report.shots)]
    return model.state_dict(), [item.perplexity for item in measured if item is not None]


def keep(folder: Path, name: str, state: dict[str, torch.Tensor], perplexities: list[float]) -> None:
    """Write what a process has."""
    everything = {key: value.clone() for key, value in state.items()}
    numbers = torch.tensor(perplexities, dtype=torch.float64)
    save_file(everything | {"perplexities": numbers}, folder / f"{name}-{os.environ['RANK']}")


def main(text: str, folder: Path) -> None:
    """Run every recipe, each with a meeting of the processes of its own; the last one in a group that is there."""
    *names, last = RECIPES
    for name in names:
        keep(folder, name, *run(name, text))
    dist.init_process_group("gloo", store=dist.PrefixStore("own", next(dist.rendezvous("env://"))[0]),
                            rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))  # fmt: skip
    keep(folder, last, *run(last, text))
    assert dist.is_initialized(), "whoever made the group ends it"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
