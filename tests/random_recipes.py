"""Recipes at random: every option within its domain and just outside, on tiny models of all families."""

from __future__ import annotations

import random

import tiny
from llm_surgeon.recipe.switches import SWITCHES

# What makes a run of a second; every option below may replace its entry.
SMALL = {"samples": 4, "seq_len": 16, "eval_window": 32, "eval_tokens": 128}
SMALL_CORRECTIONS = {"lora_steps": 2, "lora_final_steps": 2}
# What turns on what has no effect otherwise, and is refused then.
ON = {
    **{"lora": True, "reconstruction": True, "gate_steps": 1, "recover_tokens": 1024},
    **{"layer_budget": "owl", "refine": "r2-dsnot", "fisher": "true"},
}
STRUCTURES = (
    *("rows-columns", "neurons", "heads", "values", "blocks", "neurons+heads", "values+neurons", "blocks+neurons"),
    *("rows-columns+heads", "rows-columns+values", "unstructured", "2:4", "1:2", "4:8", "1:8"),
)
# Per option: values within its domain, and values outside.
DOMAINS: dict[str, tuple[tuple, tuple]] = {
    "sparsity": ((0.02, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 0.99), (0, 1, -0.5, 30, float("nan"), "half")),
    "target_params": (("8k", 9_000, 10_500), (1, 10**12, -3, "many")),
    "target_bytes": (("30KiB", 36_000), (1, "1TiB", -3)),
    "structure": (STRUCTURES, ("columns", "4:2", "0:4", "neurons+2:4", "", "heads+heads")),
    "preset": (("best", "fast", "none"), ("better", 3)),
    "method": (
        ("surgeon", "k-obd", "l-obd", "magnitude", "obs-activations", "sparsegpt", "wanda", "ria", "stochria"),
        ("surgery", ""),
    ),
    "curvature": (
        ("kfac", "nearest-kronecker", "kronecker-sum", "diagonal", "activations", "identity"),
        ("hessian", True),
    ),
    "fisher": (("empirical", "true"), (True, "exact")),
    "fisher_samples": ((1, 2), (0, -1, 1.5)),
    "gradient_share": ((0.5, 1.0), (0.0, 1.5)),
    "shots": ((1, 2, 3), (0, -1, 10**12)),
    "steps_per_shot": ((1, 2), (0,)),
    "uniform": ((True, False), ("yes", 2)),
    "round_to": ((1, 3, 8, 32), (0, 64)),
    "min_width": ((0.0, 0.05, 0.5, 0.95), (-0.1, 1.0)),
    "rank_by": (("cost-per-weight", "cost"), ("size",)),
    "stages": (((),), (("none",), "none")),
    "formats": ((("hf",),), ((), ("gif",), ("hf", "hf"))),
    "samples": ((1, 2, 3, 8), (0, 10**7)),
    "seq_len": ((2, 5, 16, 32, 128), (1, 129, 10**6)),
    "windows_per_sample": ((1, 2, 4), (0, 3, 16)),
    "bos": (("auto", "never"), ("always", "sometimes")),
    "batch_size": ((1, 3, 100), (0,)),
    "order": (("auto", "batch-major", "layer-major"), ("random",)),
    "weights": (("auto", "resident", "streamed"), ("nowhere",)),
    "host_memory": (("8GiB",), ("1KiB", 0, "lots")),
    "scratch": ((None, "."), ("/nowhere/at/all", "")),
    "scratch_space": (("8GiB",), (0, "lots")),
    "device_memory": ((), ("8GiB",)),
    "dampening_a": ((1e-4, 0.01, 1.0), (0.0, -1.0)),
    "dampening_g": ((1e-4, 0.1, 1.0), (0.0,)),
    "max_correlations": ((0, 1, 4), (-1,)),
    "update_steps": ((1, 20), (0,)),
    "scope": (("row", "layer", "global"), ("block",)),
    "layer_budget": (("uniform", "owl"), ("even",)),
    "owl_multiple": ((2.0, 5.0), (0.0,)),
    "owl_spread": ((0.01, 0.08, 0.4), (0.0, 0.5)),
    "score_alpha": ((0.0, 0.5, 2.0), (-1.0,)),
    "score_norm": ((1.0, 2.0), (0.0,)),
    "score_ratio": ((0.1, 1.0), (0.0, 1.1)),
    "score_activation": ((True, False), (2,)),
    "sparsegpt_block": ((1, 7, 128), (0,)),
    "refine": (("none", "dsnot", "r2-dsnot"), ("more",)),
    "refine_reweight": (("grow", "prune", "both"), ("none",)),
    "permute": ((True, False), ("maybe",)),
    "seed": ((0, 1, 2**31), (-1, 2**80)),
    "device": (("cpu", "auto"), ("gpu", "cuda:9")),
    "dtype": (("auto", "float32", "bfloat16", "float16"), ("float8", "int4")),
    "precision": (("bfloat16", "float32"), ("float16",)),
    "reconstruction": ((True, False), (2,)),
    "reconstruction_ridge": ((0.01, 0.2, 5.0), (0.0,)),
    "reconstruction_copies": ((0, 1, 2), (-1,)),
    "reconstruction_share": ((0.1, 1.0), (0.0,)),
    "gate_steps": ((0, 1, 3), (-1,)),
    "gate_width": ((1, 7, 1000), (0,)),
    "gate_damping": ((0.01, 1.0), (0.0,)),
    "cross_fit": ((True, False), ("both",)),
    "lora": ((True, False), ("on",)),
    "lora_rank": ((1, 4), (0,)),
    "lora_learning_rate": ((1e-3,), (0.0,)),
    "lora_batch_size": ((1, 2, 9), (0,)),
    "recover_tokens": ((512, "1K"), (0, 3, "many")),
    "recover_batch_size": ((1, 4), (0,)),
    "recover_learning_rate": ((1e-3,), (0.0, 1.0)),
    "export_shots": (((1,), (1, 2), ()), ((0,), (9,))),
    "eval_window": ((2, 16, 32, 128), (1, 129, 10**6)),
    "eval_tokens": ((32, 100, 128), (1, 10**12)),
    "ignore": ((("lm_head",), ("down_proj|fc2|c_proj",), ("q_proj",), (r"\.0\..*",)), ((".*",), ("(",))),
}
_RARELY = ("target_params", "target_bytes", "device", "device_memory", "host_memory", "scratch_space", "ignore")


def random_recipe(seed: int) -> tuple[str, dict]:
    """A family and options; one option in ten is outside its domain."""
    chance = random.Random(seed)
    family = chance.choice(sorted(tiny.BUILDERS))
    options: dict = dict(SMALL)
    common = [name for name in DOMAINS if name not in _RARELY]
    # What decides about everything else is drawn more often than its share.
    names = [*chance.sample(("structure", "sparsity", "preset", "method", "shots"), chance.randint(1, 4))]
    names += chance.sample(common, chance.randint(1, 4)) + chance.sample(_RARELY, chance.random() < 0.2)
    for name in names:
        within, outside = DOMAINS[name]
        options[name] = chance.choice(outside if outside and (chance.random() < 0.1 or not within) else within)
    if any(name in options for name in ("target_params", "target_bytes")) and chance.random() < 0.9:
        options.pop("sparsity", None)
    if chance.random() < 0.9:
        options |= {
            switch.option: ON[switch.option]
            for switch in SWITCHES
            if set(switch.others) & set(options) and switch.option not in options
        }
    if options.get("lora") is True:
        options = SMALL_CORRECTIONS | options
    return family, options
