"""Whatever a recipe says, a run ends with an export that is right, or with a named error and nothing left behind.

A few seeds by default; RANDOM_RECIPES=300 in the environment runs as many, RANDOM_RECIPES=300-400 those.
"""

from __future__ import annotations

import logging
import os

import pytest
import torch

import quick
import tiny
from llm_surgeon import PruneConfig, evaluate, load, prune_checkpoint
from llm_surgeon.errors import SurgeonError
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.loading import load_tokenizer
from random_recipes import DOMAINS, random_recipe

_ASKED = os.environ.get("RANDOM_RECIPES", "20")
SEEDS = range(*(int(part) for part in _ASKED.split("-")))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A tiny checkpoint of each family that is asked for."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("checkpoints") / family
            tiny.build(family).save_pretrained(made[family])
            tiny.tokenizer().save_pretrained(made[family])
        return made[family]

    return of


def test_every_option_is_drawn():
    left_out = {"calibration", "evaluation", "trust_remote_code", "target_latency", "lora_steps", "lora_final_steps"}
    assert DOMAINS.keys() | left_out == PruneConfig.model_fields.keys()


def coarseness(config, anatomy, layerwise_rows):
    """Share of the prunable weights that one candidate, or one rounding per row, may make of a difference."""
    parts = {}
    for layer in anatomy.layers.values():
        key = layer.block, layer.kind in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "c_fc", "gate_up_proj")
        parts[key] = parts.get(key, 0) + layer.rows * layer.columns
    if not config.parts:
        return layerwise_rows if config.layerwise else 8 / anatomy.prunable_weights
    # The last thing to go may take the rest of its part of a block with it; with uniform widths, of all blocks.
    return max(parts.values()) * (anatomy.blocks if config.uniform else 1) / anatomy.prunable_weights


@pytest.mark.parametrize("seed", SEEDS)
def test_the_outcome_is_a_right_export_or_a_named_error(seed, checkpoints, text_file, tmp_path, monkeypatch, caplog):
    quick.without_what_has_other_tests(monkeypatch)
    caplog.set_level(logging.WARNING, "llm_surgeon")
    family, options = random_recipe(seed)
    out, held_out = tmp_path / "out", tmp_path / "held-out.txt"
    held_out.write_text(text_file.read_text()[-4_000:])
    options |= {"calibration": str(text_file), "evaluation": str(held_out)}
    try:
        config = PruneConfig.from_mapping(options)
        report = prune_checkpoint(checkpoints(family), out, config)
    except SurgeonError as error:
        named = bool(error.cause and error.remedy) and "report" not in error.remedy
        assert named, f"{family} {options}: {error}"  # noqa: PT017
        assert not out.exists(), f"{family} {options}"
        return
    # The run's own tokenizer: that of Qwen's class splits words otherwise than the file of this one.
    model, tokenizer = load(out, device="cpu")[0], load_tokenizer(str(checkpoints(family)))
    context = f"{family} {options}"
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values()), context
    last = report.shots[-1]
    anatomy = examine(tiny.build(family), family_of(report.family), config.ignore)
    asked = last.target_sparsity
    fewest = min(layer.columns for layer in anatomy.layers.values())
    assert last.sparsity <= asked + (1 / fewest if config.layerwise else 1 / anatomy.prunable_weights), context
    assert asked - last.sparsity <= coarseness(config, anatomy, 1 / fewest), context
    if config.parts:
        parameters = sum(parameter.numel() for parameter in model.parameters())
        assert parameters == last.size.total, context
    measured = evaluate(
        model,
        tokenizer,
        str(held_out),
        window=config.eval_window,
        max_tokens=config.eval_tokens,
        precision=config.precision,
        bos=config.bos,
    )
    rounding = 0.05 if torch.float32 not in {value.dtype for value in model.parameters()} else 0.01
    assert measured.nll == pytest.approx(last.perplexity.nll, rel=rounding), context
    assert measured.tokens == last.perplexity.tokens, context
