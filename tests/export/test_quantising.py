"""Sentences on the quantised types that matrices fit, before and after the run."""

import pytest

from choosing import shrink
from llm_surgeon.export.quantising import foreseen_fit, measured_fit
from llm_surgeon.models import examine, family_of
from llm_surgeon.pruning.shapes import Shapes
from llm_surgeon.recipe.config import PruneConfig
from tiny import llama

SHAPE = {
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
}


def recipe(**options):
    return PruneConfig.from_mapping({"structure": "neurons+heads", "sparsity": 0.3, **options})


@pytest.mark.parametrize(("round_to", "fits"), [("q4_k_m", True), (256, False), (None, False)])
def test_the_plan_says_what_the_widths_will_fit(round_to, fits):
    model = llama(**SHAPE)
    anatomy = examine(model, family_of("llama"))
    small, large = foreseen_fit(recipe(round_to=round_to), anatomy, model.config)
    assert "every matrix" in small
    assert ("every matrix" in large) == fits
    # Neurons are rounded by a number too, heads by the name of a type only.
    assert ("o_proj in blocks" in large) == (not fits)
    assert ("down_proj in blocks" in large) == (round_to is None)


def test_a_width_of_the_model_that_no_rounding_mends_is_said():
    model = llama(**{**SHAPE, "hidden_size": 576})
    anatomy = examine(model, family_of("llama"))
    _, large = foreseen_fit(recipe(round_to="q4_k"), anatomy, model.config)
    assert "not for q_proj, k_proj, v_proj, gate_proj, up_proj (576 columns)" in large
    assert "Q5_0 (of Q4_K)" in large
    _, large = measured_fit(model, anatomy.family)
    assert "10 of 14 matrices" in large


@pytest.mark.parametrize("seed", range(3))
def test_what_the_plan_promises_is_what_is_counted_after_the_run(seed):
    model = llama(**SHAPE)
    anatomy = examine(model, family_of("llama"))
    keep = Shapes(recipe(round_to="q4_k"), anatomy).random_masks(0.3, seed=seed)
    shrink(model, anatomy, keep)
    assert any(not mask.rows.all() for mask in keep.values())
    assert all("every matrix" in line for line in measured_fit(model, anatomy.family))


def test_nothing_is_said_of_matrices_with_gaps():
    model = llama(**SHAPE)
    anatomy = examine(model, family_of("llama"))
    assert foreseen_fit(recipe(structure="rows-columns"), anatomy, model.config) == ()
