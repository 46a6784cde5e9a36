"""Qwen 2 and 3: Llama's layout; Qwen 2 has biases on queries, keys and values, Qwen 3 norms on queries and keys."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA

QWEN2 = replace(LLAMA, model_type="qwen2", model_class="Qwen2ForCausalLM", config_class="Qwen2Config")
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    model_class="Qwen3ForCausalLM",
    config_class="Qwen3Config",
    parts=(replace(ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm")), FEED_FORWARD),
)
