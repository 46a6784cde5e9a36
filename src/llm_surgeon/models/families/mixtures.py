"""Mixtures of experts in Llama's layout: Qwen 3 (MoE), Mixtral, GLM 4.5, DeepSeek V3 and gpt-oss."""

from dataclasses import replace

from llm_surgeon.models.experts import Layout
from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA
from llm_surgeon.models.parts import MixtureOfExperts, PlainLayers

QWEN3_MOE = replace(
    LLAMA,
    model_type="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    config_class="Qwen3MoeConfig",
    # Some blocks may have a dense feed-forward part instead.
    parts=(
        replace(ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
        replace(FEED_FORWARD, optional=True),
        MixtureOfExperts(),
    ),
)
MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    config_class="MixtralConfig",
    parts=(ATTENTION, MixtureOfExperts(count="num_local_experts", width="intermediate_size")),
)

# The first blocks are dense; in the others an expert that all tokens go to runs beside those that a router chooses.
_DENSE = replace(FEED_FORWARD, optional=True)
_ALWAYS = replace(
    FEED_FORWARD,
    inputs=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    output="mlp.shared_experts.down_proj",
)
_CHOSEN = MixtureOfExperts(
    count="n_routed_experts",
    groups="n_group",
    tied_width=True,
    router_tensors=("weight", "e_score_correction_bias"),
)
GLM4_MOE = replace(
    LLAMA,
    model_type="glm4_moe",
    model_class="Glm4MoeForCausalLM",
    config_class="Glm4MoeConfig",
    parts=(
        # Some models have these norms, others have not.
        replace(ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
        _DENSE,
        _CHOSEN,
        _ALWAYS,
    ),
)
# Its attention, with compressed queries, keys and values, stays as it is.
_LATENT = PlainLayers(
    groups=(
        ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_proj"),
        ("self_attn.q_b_proj",),
        ("self_attn.kv_b_proj",),
        ("self_attn.o_proj",),
    ),
    reading=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.q_proj"),
    writing=("self_attn.o_proj",),
    others=("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm"),
)
DEEPSEEK_V3 = replace(
    LLAMA,
    model_type="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    config_class="DeepseekV3Config",
    parts=(_LATENT, _DENSE, _CHOSEN, _ALWAYS),
)

GPT_OSS = replace(
    LLAMA,
    model_type="gpt_oss",
    model_class="GptOssForCausalLM",
    config_class="GptOssConfig",
    parts=(
        replace(ATTENTION, sinks="sinks"),
        MixtureOfExperts(
            router="mlp.router",
            count="num_local_experts",
            width="intermediate_size",
            router_tensors=("weight", "bias"),
            activation=None,
            layout=Layout(transposed=True, interleaved=True),
            # A value of 0 becomes a factor of 1.
            value_kills=False,
        ),
    ),
)
