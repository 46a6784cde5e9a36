"""Hunyuan (dense): Llama's layout, with norms of heads behind the rotary embeddings."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA

HUNYUAN_V1_DENSE = replace(
    LLAMA,
    model_type="hunyuan_v1_dense",
    model_class="HunYuanDenseV1ForCausalLM",
    config_class="HunYuanDenseV1Config",
    parts=(
        replace(ATTENTION, head_norms=("self_attn.query_layernorm", "self_attn.key_layernorm")),
        FEED_FORWARD,
    ),
)
