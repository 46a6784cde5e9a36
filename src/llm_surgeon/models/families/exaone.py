"""EXAONE 4: Llama's layout with norms of heads, and norms of the parts' outputs in place of their inputs."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA

EXAONE4 = replace(
    LLAMA,
    model_type="exaone4",
    model_class="Exaone4ForCausalLM",
    config_class="Exaone4Config",
    parts=(replace(ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm")), FEED_FORWARD),
    residual=replace(LLAMA.residual, norms=("post_attention_layernorm", "post_feedforward_layernorm")),
)
