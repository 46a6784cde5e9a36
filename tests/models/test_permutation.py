"""Folding an order of channels leaves the function of every family's models as it is."""

import re
from functools import partial
from importlib import import_module

import pytest
import torch

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.mathematics.channel_permutation import find_permutation, retained
from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.models import FAMILIES, family_of
from llm_surgeon.models.anatomy import examine
from llm_surgeon.models.permutation import fold_order, fold_residual
from tiny import ALONE, MIXTURES, NEURONS_ALONE, llama, opt, tokens

VARIANTS = {
    **ALONE,
    "llama-one-kv-head": lambda: llama(num_key_value_heads=1),
    "llama-no-gqa-untied": lambda: llama(num_key_value_heads=4, tie_word_embeddings=False),
    "opt-untied": lambda: opt(tie_word_embeddings=False),
    "opt-projected": lambda: opt(word_embed_proj_dim=16),
    "opt-projected-untied": lambda: opt(word_embed_proj_dim=16, tie_word_embeddings=False),
    "opt-post-norm-unprojected": lambda: opt(do_layer_norm_before=False),
    "opt-plain-norms": lambda: opt(layer_norm_elementwise_affine=False),
}
# Norms that multiply by their weight.
NORMS = [
    *("LlamaRMSNorm", "MistralRMSNorm", "Phi3RMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "SmolLM3RMSNorm"),
    *("SeedOssRMSNorm", "Ministral3RMSNorm", "HunYuanDenseV1RMSNorm", "Exaone4RMSNorm", "GraniteRMSNorm"),
    *("Olmo2RMSNorm", "Olmo3RMSNorm", "Glm4RMSNorm", "Ernie4_5RMSNorm", "HeliumRMSNorm"),
]
# The capped attention of Gemma 2 takes its softmax in float32, ERNIE rotates and delta nets compute in float32.
ROUNDED = ("gemma2", "ernie4-5", "qwen3-5")
variants = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch):
    """The real ones compute in float32 whatever their input, which hides differences below 1e-7."""

    def normalised(x, epsilon):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)

    for name in NORMS:
        norm = norm_of(name)
        monkeypatch.setattr(norm, "forward", lambda self, x: self.weight * normalised(x, self.variance_epsilon))
    for name in ("Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3_5RMSNorm"):
        monkeypatch.setattr(norm_of(name), "forward", lambda self, x: (1 + self.weight) * normalised(x, self.eps))

    def centred(self, x):
        return self.weight * normalised(x - x.mean(-1, keepdim=True), self.variance_epsilon)

    monkeypatch.setattr(norm_of("Cohere2LayerNorm"), "forward", centred)


def norm_of(name):
    """A norm's class, by its name."""
    model = re.fullmatch(r"(.*?)(?:RMS|Layer)Norm", name)[1]
    folder = {"SmolLM3": "smollm3", "SeedOss": "seed_oss", "HunYuanDenseV1": "hunyuan_v1_dense"}
    folder = folder.get(model, model.lower())
    return getattr(import_module(f"transformers.models.{folder}.modeling_{folder}"), name)


def build(variant):
    """In float64 and with every parameter random: norms of ones and biases of zeros would hide mistakes."""
    torch.manual_seed(0)
    model = VARIANTS[variant]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    examine(model, entry(model))  # makes transposed layers plain
    return model


def entry(model):
    return family_of(model.config.model_type)


def logits(model):
    with torch.no_grad():
        return model(tokens(3, 12, seed=7)).logits


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters(remove_duplicate=False)}


def order(size, seed):
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def all_orders(model):
    return [one for part in examine(model, entry(model)).parts for one in part.orders()]


def free(model, name):
    """The orders of this name inside the parts of a model, block by block."""
    return [one for one in all_orders(model) if one.name == name]


def all_of(model, name):
    for number, one in enumerate(free(model, name)):
        fold_order(model, one, torch.stack([order(one.channels, 10 * number + at) for at in range(one.sets)]))


def all_neurons(model):
    all_of(model, "neurons")


def all_values(model):
    all_of(model, "dimensions of a head")


def residual(model):
    fold_residual(model, entry(model), order(model.config.hidden_size, 99))


def everything(model):
    all_neurons(model)
    residual(model)
    all_values(model)


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@variants
@pytest.mark.parametrize("fold", [all_neurons, all_values, residual, everything])
def test_the_function_stays_and_the_weights_move(variant, fold):
    model = build(variant)
    expected, before = logits(model), state(model)
    fold(model)
    after = state(model)
    difference = (logits(model) - expected).abs().max() / expected.abs().max()
    assert difference <= (1e-6 if variant in ROUNDED else 1e-10)
    assert changed(before, after)
    for name in before:  # Moved, and nothing else.
        assert torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values)


def test_every_family_is_covered():
    # Mixtures are checked in test_mixtures.py, Gemma 4 in test_gemma4.py.
    others = {builder().config.model_type for builder in (MIXTURES | NEURONS_ALONE).values()}
    alone = {name for name, family in FAMILIES.items() if family.text_config is None}
    assert {VARIANTS[variant]().config.model_type for variant in VARIANTS} == alone - others


@variants
def test_what_moves(variant):
    """Each fold moves the parameters along its axis by its order, and leaves the others alone."""
    for fold, moving in ((all_neurons, "neurons"), (all_values, "values"), (residual, "residual")):
        model = build(variant)
        family, before = entry(model), state(model)
        fold(model)
        attention, feed_forward = family.parts[0], family.parts[-1]
        inside = {
            "neurons": {*feed_forward.inputs, feed_forward.output},
            "values": {attention.value, attention.output, *([attention.query] if attention.gated else [])},
        }
        moved = changed(before, state(model))
        if moving == "residual":
            # All but what has another width: biases of readers, and embeddings and head beyond a projection.
            readers = [name for part in family.parts for name in part.readers]
            still = {f"{family.blocks}.{n}.{name}.bias" for n in range(2) for name in readers}
            within = {f"{family.blocks}.{n}.{name}" for n in range(2) for part in family.parts for name in part.inside}
            still |= {name for name in before if name.rpartition(".")[0] in within}
            if model.config.to_dict().get("word_embed_proj_dim", 24) != 24:
                still |= {f"{family.residual.tokens}.weight", "lm_head.weight"}
            assert moved == set(before) - still
        else:
            outputs = {feed_forward.output, attention.output}
            expected = {
                f"{family.blocks}.{n}.{name}.{kind}"
                for n in range(2)
                for name in inside[moving]
                for kind in ("weight", "bias")
                if not (name in outputs and kind == "bias")
            }
            assert moved == expected & set(before)


@variants
def test_tied_embeddings_stay_tied_and_move_once(variant):
    model = build(variant)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = embedding is head
    before = embedding.detach().clone()
    residual(model)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    width = model.config.hidden_size
    expected = before[:, order(width, 99)] if before.shape[1] == width else before
    assert torch.equal(model.get_input_embeddings().weight, expected)


def test_the_order_is_read_as_find_gives_it():
    """Channel i afterwards is channel permutation[i] before, so what was found is what is retained."""
    model, pattern = build("llama"), Pattern(2, 4)
    layer = model.model.layers[1].mlp.down_proj
    scores = layer.weight.detach().abs()
    found = find_permutation(scores, pattern)
    promised = retained(scores[:, found], pattern)
    fold_order(model, free(model, "neurons")[1], found[None])
    assert torch.equal(layer.weight.abs(), scores[:, found])
    assert retained(layer.weight.detach().abs(), pattern) == promised > 1.001 * retained(scores, pattern)


def test_values_move_within_the_query_heads_that_share_them():
    model = build("llama")  # Four query heads of eight dimensions, two key/value heads.
    attention = model.model.layers[0].self_attn
    value, output = attention.v_proj.weight.detach().clone(), attention.o_proj.weight.detach().clone()
    orders = torch.stack([order(8, 1), order(8, 2)])
    fold_order(model, free(model, "dimensions of a head")[0], orders)
    assert torch.equal(attention.v_proj.weight, torch.cat([value[:8][orders[0]], value[8:][orders[1]]]))
    columns = torch.cat([orders[0], 8 + orders[0], 16 + orders[1], 24 + orders[1]])
    assert torch.equal(attention.o_proj.weight, output[:, columns])


def test_what_is_no_permutation_is_refused_and_nothing_changes():
    model = build("llama")
    before = state(model)
    neurons, values = free(model, "neurons")[0], free(model, "dimensions of a head")[0]
    with pytest.raises(ValueError, match="not a permutation of 40 neurons"):
        fold_order(model, neurons, torch.zeros(1, 40, dtype=torch.long))
    with pytest.raises(ValueError, match="not a permutation of 24 channels"):
        fold_residual(model, entry(model), torch.arange(23))
    with pytest.raises(ValueError, match="not a permutation of 8 dimensions"):
        fold_order(model, values, torch.stack([torch.arange(8), torch.arange(8) + 8]))
    with pytest.raises(ValueError, match="1 orders of dimensions of a head for 2 sets"):
        fold_order(model, values, torch.arange(8)[None])
    assert not changed(before, state(model))


def test_parameters_that_the_entry_does_not_know_are_refused():
    model = build("llama")
    model.model.layers[1].register_module("extra", torch.nn.LayerNorm(24))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.extra\.weight"):
        residual(model)


@pytest.mark.parametrize("name", ["neurons", "dimensions of a head", "residual"])
def test_layers_that_are_not_linear_are_refused_and_nothing_changes(name):
    model = build("llama")
    folds = {
        one.name: partial(fold_order, model, one, order(one.channels, 0).expand(one.sets, -1))
        for one in all_orders(model)[1::-1]
    }
    folds["residual"] = partial(residual, model)
    model.model.layers[0].mlp.up_proj = torch.nn.Identity()
    model.model.layers[0].self_attn.o_proj = torch.nn.Identity()
    before = state(model)
    with pytest.raises(UnsupportedModelError, match=r"(up|o)_proj is a Identity"):
        folds[name]()
    assert not changed(before, state(model))
