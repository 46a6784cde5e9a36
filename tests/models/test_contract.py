"""The contract of a model family; a new family is one more entry in ``tiny.BUILDERS``."""

import pytest
import torch

from choosing import choose, masked, shrink
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError, UnsupportedModelError
from llm_surgeon.export.save import save_model
from llm_surgeon.export.verify import verify_export
from llm_surgeon.mathematics.keep_masks import StructureCosts, count_weights
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.modeling_pruned import PrunedLinear
from llm_surgeon.pruning.shots import run_shots
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.session.session import Session
from llm_surgeon.testing import check_family
from tiny import BUILDERS, build, tokenizer, tokens

families = pytest.mark.parametrize("family", BUILDERS)
CONFIG = PruneConfig(preset="none", sparsity=0.5, shots=2, samples=8, seq_len=16, precision="float32", dampening_g=0.5)


def anatomy_of(model):
    return examine(model, family_of(model.config.model_type))


def logits(model):
    with torch.no_grad():
        return model(tokens(3, 12, seed=7)).logits


@families
def test_the_entry_is_right(family):
    """Layers, couplings, narrowing, orders of channels and exports: what people check their own families by."""
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_family(family_of(model.config.model_type), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def random_masks(anatomy, seed, share=0.3):
    """Random removals, closed under implication."""
    generator = torch.Generator().manual_seed(seed)
    keep = anatomy.dense_masks()
    costs = {
        name: StructureCosts(
            torch.rand(mask.rows.shape, generator=generator), torch.rand(mask.columns.shape, generator=generator)
        )
        for name, mask in keep.items()
    }
    return choose(keep, costs, anatomy.couplings, round((1 - share) * anatomy.prunable_weights)).keep


@families
def test_neurons_narrow_the_hidden_tensor_without_an_index(family):
    model = build(family)
    anatomy = anatomy_of(model)
    keep = anatomy.dense_masks()
    for coupling in anatomy.couplings:
        if coupling.kind == "neuron":
            for side in coupling.sides:
                keep[side.layer].axis(side.axis)[:7] = False
    shrink(model, anatomy, keep)
    assert not any(isinstance(module, PrunedLinear) for module in model.modules())


@families
def test_shots_shrink_the_model_and_the_export_is_equal(family, tmp_path):
    model = build(family)
    anatomy = anatomy_of(model)
    sizes = []
    for result in run_shots(Session(model, anatomy, CalibrationTokens(tokens(8, 16), None, {}), CONFIG)):
        keep = result.masks
        sizes.append(count_weights(keep) / anatomy.prunable_weights)
        assert sum(core_of(model, la).weight.numel() for la in anatomy.layers.values()) == count_weights(keep)
    assert 0.75 <= sizes[0] < 0.85
    assert 0.5 <= sizes[1] < 0.6
    save_model(model, tokenizer(), anatomy, keep, tmp_path)
    check = verify_export(model, tmp_path)
    assert check.difference <= 1e-4 * check.scale


def test_ignored_layers_stay_whole_and_dense():
    model = build("llama")
    anatomy = examine(model, family_of(model.config.model_type), ignore=("layers.0.mlp.down_proj", "lm_head"))
    assert "model.layers.0.mlp.down_proj" not in anatomy.layers
    assert len(anatomy.layers) == 13
    keep = random_masks(anatomy, 2)
    shrink(model, anatomy, keep)
    assert logits(model).isfinite().all()
    assert model.model.layers[0].mlp.down_proj.weight.shape == (24, 40)


def test_ignoring_every_layer_is_refused():
    model = build("llama")
    with pytest.raises(ConfigError, match="nothing to prune"):
        examine(model, family_of("llama"), ignore=("_proj",))


def test_unknown_architectures_are_refused_with_the_place_to_extend():
    with pytest.raises(UnsupportedModelError, match=r"'mamba'.*llm_surgeon/models"):
        family_of("mamba")


def test_pruned_checkpoints_are_refused():
    with pytest.raises(UnsupportedModelError, match="pruned by llm-surgeon already"):
        family_of("llm_surgeon_llama")


def test_an_activation_that_keeps_dead_neurons_alive_is_refused():
    from tiny import opt

    with pytest.raises(UnsupportedModelError, match=r"'sigmoid' maps 0 to 0\.5"):
        anatomy_of(opt(activation_function="sigmoid"))


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_norms_of_heads_untie_queries_and_keys(family):
    """A key dimension whose query dimension is dead still counts in its norm: the entry says so, and it is so."""
    one, both = build(family), build(family)
    anatomy = anatomy_of(one)
    assert {coupling.kind for coupling in anatomy.couplings}.isdisjoint({"query/key pair", "query/key dimension"})
    keep = anatomy.dense_masks()
    keep["model.layers.0.self_attn.q_proj"].rows[::8] = False
    masked(one, anatomy, keep)
    keep["model.layers.0.self_attn.k_proj"].rows[::8] = False
    masked(both, anatomy, keep)
    assert (logits(one) - logits(both)).abs().max() > 1e-3
