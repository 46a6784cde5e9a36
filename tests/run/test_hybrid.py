"""Runs of a model whose blocks have attention or delta nets, from the plan to the export that a stranger loads."""

import pytest
from transformers import AutoModelForCausalLM

from llm_surgeon import PruneConfig, plan, prune_checkpoint
from tiny import build, tokenizer

SMALL = {"samples": 8, "seq_len": 16, "eval_window": 32, "eval_tokens": 256, "shots": 2}
# Options of the recipe, and the sparsity that they reach: heads and parts go whole.
RECIPES = {
    "default": ({"sparsity": 0.4, "order": "layer-major"}, 0.39),
    "heads": ({"structure": "neurons+heads", "sparsity": 0.4, "round_to": 1, "preset": "best"}, 0.38),
    "uniform": ({"structure": "neurons+heads", "sparsity": 0.4, "uniform": True, "round_to": 8}, 0.35),
    "streamed": ({"structure": "heads+rows-columns", "preset": "none", "weights": "streamed"}, 0.46),
    "a pattern": ({"method": "wanda", "structure": "2:4", "permute": True, "sparsity": 0.5, "shots": 1}, 0.5),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_from_the_plan_to_the_reloaded_export(name, text_file, tmp_path):
    options, reached = RECIPES[name]
    build("qwen3-5").save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    recipe = PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), **options})
    foreseen = plan(str(tmp_path / "dense"), recipe)
    report = prune_checkpoint(str(tmp_path / "dense"), tmp_path / "out", recipe)
    assert foreseen.dense_size == report.dense_size
    assert reached - 0.01 <= report.shots[-1].sparsity <= recipe.sparsity
    assert report.export.plain == (name in ("uniform", "a pattern"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not report.export.plain)
    # Zeros of a pattern are stored.
    size = report.dense_size if name == "a pattern" else report.shots[-1].size
    assert sum(parameter.numel() for parameter in loaded.parameters()) == size.total
