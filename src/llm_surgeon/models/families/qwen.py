"""Qwen 2, 3 and 3.5: Llama's layout; Qwen 2 has biases on queries, keys and values, the others norms of heads.

In Qwen 3.5 attention has gates, and most blocks have a delta net in its place.
"""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA
from llm_surgeon.models.parts import DeltaNet

_NORMED = replace(ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm"))

QWEN2 = replace(LLAMA, model_type="qwen2", model_class="Qwen2ForCausalLM", config_class="Qwen2Config")
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    parts=(_NORMED, FEED_FORWARD),
)
# The text model; checkpoints with images are of another type.
QWEN3_5 = replace(
    LLAMA,
    model_type="qwen3_5_text",
    model_class="Qwen3_5ForCausalLM",
    config_class="Qwen3_5TextConfig",
    parts=(
        replace(_NORMED, gated=True),
        DeltaNet(
            module="linear_attn",
            query_key_value="linear_attn.in_proj_qkv",
            gate="linear_attn.in_proj_z",
            strength="linear_attn.in_proj_b",
            decay="linear_attn.in_proj_a",
            output="linear_attn.out_proj",
            convolution="linear_attn.conv1d",
            norm="linear_attn.norm",
        ),
        FEED_FORWARD,
    ),
)
