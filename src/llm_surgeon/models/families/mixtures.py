"""Mixtures of experts in Llama's layout: Qwen 3 (MoE) and Mixtral."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA
from llm_surgeon.models.parts import MixtureOfExperts

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
