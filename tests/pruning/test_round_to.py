"""Widths for quantised types, and numbers of heads that a class can be built with."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import LlamaConfig

from choosing import attentions, feed_forwards, made_up_costs
from llm_surgeon.errors import ConfigError
from llm_surgeon.export.form import form_of
from llm_surgeon.mathematics.widths import Widths
from llm_surgeon.models import examine, family_of
from llm_surgeon.pruning.shapes import Shapes, check_shapes
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.quantised import QUANTISED, quantised_type
from tiny import llama


def recipe(**options):
    return PruneConfig.from_mapping({"structure": "neurons+heads", "sparsity": 0.4, **options})


def left(anatomy, config, seed):
    """Heads, key/value heads and neurons of each block after a random removal."""
    generator = torch.Generator().manual_seed(seed)
    shapes = Shapes(config, anatomy)
    costs = made_up_costs(shapes, anatomy, lambda count: torch.rand(count, generator=generator))
    keep = shapes.select(costs, round((1 - config.sparsity) * anatomy.prunable_weights)).keep
    found = []
    for attention, feed in zip(attentions(anatomy), feed_forwards(anatomy), strict=True):
        sizes = attention.sizes(keep) | feed.sizes(keep)
        found.append(tuple(sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size")))
    return found, keep


def test_a_pool_is_left_with_allowed_widths_only():
    assert Widths(multiple=4).allowed(10) == [8, 4, 0]
    assert Widths(multiple=4, least=3).allowed(8) == [4]
    assert Widths(counts=frozenset({6, 3, 9})).allowed(9) == [6, 3]
    assert Widths(least=1).allowed(3) == [2, 1]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("name", ["q4_k_m", "Q8_0"])
def test_neurons_and_all_heads_together_fit_the_blocks_of_a_quantised_type(name, uniform):
    model = llama(hidden_size=32, head_dim=64, num_attention_heads=16, num_key_value_heads=4, intermediate_size=2048)
    anatomy = examine(model, family_of("llama"))
    config = recipe(round_to=name, uniform=uniform)
    block = QUANTISED[quantised_type(name)].block
    dense = (16, 4, 2048)
    for seed in range(3):
        widths, _ = left(anatomy, config, seed)
        assert any(width != dense for width in widths)
        for heads, _, neurons in widths:
            assert neurons % block == 0
            assert heads * 64 % block == 0


def test_heads_that_do_not_fit_as_they_are_stay_or_become_fitting():
    """14 heads of 64 dimensions are no multiple of 256; 12 and 8 are."""
    model = llama(hidden_size=56, head_dim=64, num_attention_heads=14, num_key_value_heads=2, intermediate_size=1024)
    anatomy = examine(model, family_of("llama"))
    seen = {heads for seed in range(4) for heads, _, _ in left(anatomy, recipe(round_to="q4_k"), seed)[0]}
    assert seen <= {14, 12, 8, 4}
    assert seen & {12, 8, 4}


def test_a_number_rounds_the_neurons_alone():
    model = llama(head_dim=8, num_attention_heads=6, num_key_value_heads=3, intermediate_size=512)
    anatomy = examine(model, family_of("llama"))
    seen = {heads for seed in range(4) for heads, _, _ in left(anatomy, recipe(round_to=256), seed)[0]}
    assert any(heads * 8 % 256 for heads in seen)


def test_uniform_heads_are_such_that_the_class_takes_them():
    """Llama's configuration wants a hidden size that the number of heads divides, and 7 x 4 of 32 heads do not."""
    shape = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 4, "hidden_size": 64}
    with pytest.raises(StrictDataclassClassValidationError, match="not a multiple"):
        LlamaConfig(**{**shape, "num_attention_heads": 28, "num_key_value_heads": 7})
    model = llama(**shape)
    anatomy = examine(model, family_of("llama"))
    config = recipe(uniform=True, structure="heads", sparsity=0.3)
    for seed in range(5):
        _, keep = left(anatomy, config, seed)
        assert form_of(anatomy, keep, model.config).plain


def test_a_quantised_type_is_for_neurons_and_heads():
    for structure in ("rows-columns", "values", "blocks", "2:4"):
        with pytest.raises(ConfigError, match=r"round_to q4_k is for neurons and heads"):
            recipe(structure=structure, round_to="q4_k", sparsity=0.5)
    with pytest.raises(ConfigError, match="neither a whole number nor a quantised type"):
        recipe(round_to="q4k")


def test_the_resolved_recipe_says_the_type_and_makes_the_same_run():
    config = recipe(round_to="Q4_K_M")
    assert config.widths_multiple == 256
    assert PruneConfig.from_mapping(config.resolved()).block_of_quantised == 256
    assert recipe(round_to="64").widths_multiple == 64


def test_a_sparsity_that_the_widths_cannot_reach_is_refused_before_the_work():
    model = llama(head_dim=64, hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=256)
    anatomy = examine(model, family_of("llama"))
    with pytest.raises(ConfigError, match="can be removed"):
        check_shapes(recipe(round_to="q4_k", sparsity=0.5), anatomy)
