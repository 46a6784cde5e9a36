"""Qwen 2 to 3.5: Llama's layout; Qwen 2 has biases on queries, keys and values, the others norms of heads.

In Qwen 3-Next and 3.5 attention has gates, and most blocks have a delta net in its place. The feed-forward parts of
3-Next, and of the larger 3.5, are mixtures, beside which an expert runs that all tokens go to.
"""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA
from llm_surgeon.models.parts import DeltaNet, MixtureOfExperts

_NORMED = replace(ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm"))

QWEN2 = replace(LLAMA, model_type="qwen2", model_class="Qwen2ForCausalLM", config_class="Qwen2Config")
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    parts=(_NORMED, FEED_FORWARD),
)
_GATED = replace(_NORMED, gated=True)
_DELTA_NET = DeltaNet(
    module="linear_attn",
    query_key_value="linear_attn.in_proj_qkv",
    gate="linear_attn.in_proj_z",
    strength="linear_attn.in_proj_b",
    decay="linear_attn.in_proj_a",
    output="linear_attn.out_proj",
    convolution="linear_attn.conv1d",
    norm="linear_attn.norm",
)
# The text model; for checkpoints with images see ``towers.py``.
QWEN3_5 = replace(
    LLAMA,
    model_type="qwen3_5_text",
    model_class="Qwen3_5ForCausalLM",
    config_class="Qwen3_5TextConfig",
    parts=(_GATED, _DELTA_NET, FEED_FORWARD),
)
_ALWAYS = replace(
    FEED_FORWARD,
    inputs=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    output="mlp.shared_expert.down_proj",
    width="shared_expert_intermediate_size",
    factor="mlp.shared_expert_gate",
)
QWEN3_5_MOE = replace(
    LLAMA,
    model_type="qwen3_5_moe_text",
    model_class="Qwen3_5MoeForCausalLM",
    config_class="Qwen3_5MoeTextConfig",
    parts=(_GATED, _DELTA_NET, MixtureOfExperts(), _ALWAYS),
)
QWEN3_NEXT = replace(
    LLAMA,
    model_type="qwen3_next",
    model_class="Qwen3NextForCausalLM",
    config_class="Qwen3NextConfig",
    parts=(
        _GATED,
        replace(
            _DELTA_NET,
            query_key_value="linear_attn.in_proj_qkvz",
            gate="linear_attn.in_proj_qkvz",
            strength="linear_attn.in_proj_ba",
            decay="linear_attn.in_proj_ba",
        ),
        # Some blocks may have a dense feed-forward part instead.
        replace(FEED_FORWARD, optional=True),
        MixtureOfExperts(),
        _ALWAYS,
    ),
)
