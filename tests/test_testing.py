"""Entries that are wrong in one place, each of which ``check_family`` refuses with the place to correct."""

from dataclasses import replace

import pytest
import torch

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models import family_of
from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD
from llm_surgeon.testing import check_family
from tiny import build, opt


def with_attention(name, **changes):
    family = family_of(name)
    return replace(family, parts=(replace(family.parts[0], **changes), *family.parts[1:]))


def with_feed_forward(name, **changes):
    family = family_of(name)
    return replace(family, parts=(family.parts[0], replace(family.parts[1], **changes)))


def with_delta_net(**changes):
    family = family_of("qwen3_5_text")
    attention, delta_net, feed_forward = family.parts
    return replace(family, parts=(attention, replace(delta_net, **changes), feed_forward))


def with_residual(name, **changes):
    family = family_of(name)
    return replace(family, residual=replace(family.residual, **changes))


LLAMA = family_of("llama")
OLMO_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# The model, the wrong entry, and what the error says.
WRONG = {
    "type": ("llama", replace(LLAMA, model_type="lama"), "says lama, and the model has llama"),
    "class": ("llama", replace(LLAMA, model_class="Llama"), "says Llama, and the model has LlamaForCausalLM"),
    "configuration": ("llama", replace(LLAMA, config_class="OPTConfig"), "says OPTConfig, and the model has LlamaC"),
    "blocks": ("llama", replace(LLAMA, blocks="model.norm"), r"the blocks are model\.norm, and the model has no list"),
    "embedding": ("llama", with_residual("llama", tokens="model.wte"), r"the token embedding is model\.wte, and"),
    "norm": ("llama", with_residual("llama", norms=("ln_1",)), r"names the norm model\.layers\.0\.ln_1, and"),
    "forgotten norm": (
        "llama",
        with_residual("llama", norms=("input_layernorm",)),
        r"does not say how .*post_attention_layernorm\.weight depends on the order of channels",
    ),
    "last norm": ("llama", with_residual("llama", final_norm="norm"), r"does not say how model\.norm\.weight depends"),
    "output": ("llama", with_attention("llama", output="self_attn.out"), r"has no self_attn\.out.*self_attn\.o_proj"),
    "module": ("llama", with_attention("llama", module="attn"), "No block of the model has the Attention that"),
    "forgotten layer": (
        "llama",
        with_feed_forward("llama", inputs=("mlp.gate_proj",)),
        r"does not name the linear layer model\.layers\.0\.mlp\.up_proj",
    ),
    "layers of other inputs": (
        "llama",
        with_feed_forward("llama", inputs=("mlp.gate_proj", "mlp.down_proj"), output="mlp.up_proj"),
        "read the same input, and they do not",
    ),
    "keys for values": (
        "llama",
        with_attention("llama", key="self_attn.v_proj", value="self_attn.k_proj"),
        "what is said to be dead has an effect .*value dimension",
    ),
    "no rotation": ("llama", with_attention("llama", rotary=False), "dead has an effect .*query/key dimension"),
    "no norms of heads": ("qwen3", with_attention("qwen3", head_norms=()), "dead has an effect .*query/key pair"),
    "halves for neighbours": (
        "helium",
        with_attention("helium", interleaved=False),
        "dead has an effect .*query/key pair",
    ),
    "single heads under one norm": (
        "olmo2",
        replace(family_of("olmo2"), parts=(replace(ATTENTION, head_norms=OLMO_NORMS), FEED_FORWARD)),
        "dead has an effect .*query head",
    ),
    "no gates of attention": (
        "qwen3-5",
        with_attention("qwen3_5_text", gated=False),
        "cannot be run without some of its weights .*query head",
    ),
    "gates that are none": ("qwen3", with_attention("qwen3", gated=True), "couples rows of .*q_proj up to number 63"),
    "heads of a delta net without their numbers": (
        "qwen3-5",
        with_delta_net(of_heads=("A_log",)),
        "cannot be run without some of its weights",
    ),
    "a norm in place of the convolution": (
        "qwen3-5",
        with_delta_net(convolution="linear_attn.norm"),
        "does not allow to cut weights out",
    ),
    "gates for queries": (
        "qwen3-5",
        with_delta_net(query_key_value="linear_attn.in_proj_z", gate="linear_attn.in_proj_qkv"),
        r"couples rows of model\.layers\.0\.linear_attn\.in_proj_z up to number 55, and the layer has 32",
    ),
    "layout": ("gpt-neox", with_attention("gpt_neox", layout="stacked"), "what is said to be dead has an effect"),
    "no counts": ("llama", with_attention("llama", counts=()), "cannot be run without some of its weights"),
    "wrong count": (
        "llama",
        with_attention("llama", counts=(("num_key_value_groups", "heads"),)),
        "cannot be run without some of its weights",
    ),
    "tied heads": ("opt", with_attention("opt", free_heads=True), "gives an export with which OPTForCausalLM cannot"),
    "width": (
        "llama",
        with_feed_forward("llama", width="neurons"),
        "gives an export with which LlamaForCausalLM cannot",
    ),
    "transposed": ("gpt2", replace(family_of("gpt2"), transposed=False), "transposed is False, and .* is a Conv1D"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_entry_is_refused_with_the_place_to_correct(mistake):
    model, family, words = WRONG[mistake]
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        check_family(family, build(model))
    assert caught.value.remedy


def test_an_activation_that_keeps_dead_neurons_alive_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"'sigmoid' maps 0 to 0\.5"):
        check_family(family_of("opt"), opt(activation_function="sigmoid"))


def test_the_weights_of_the_model_do_not_matter():
    """Fresh weights of zero would hide every mistake."""
    model = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    check_family(LLAMA, model)
    with pytest.raises(UnsupportedModelError, match="query/key dimension"):
        check_family(with_attention("llama", rotary=False), model)
