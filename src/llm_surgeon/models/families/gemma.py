"""Gemma 2 and 3: norms before and after each part of a block, scaled embeddings, windows; caps, or norms of heads."""

from dataclasses import replace

from llm_surgeon.models.families.llama import LLAMA

_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    model_class="Gemma2ForCausalLM",
    config_class="Gemma2Config",
    feed_forward=replace(LLAMA.feed_forward, activation="hidden_activation"),
    residual=replace(LLAMA.residual, norms=_NORMS),
)
# The text model; checkpoints with images are of another type.
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    model_class="Gemma3ForCausalLM",
    config_class="Gemma3TextConfig",
    attention=replace(LLAMA.attention, head_norms=("self_attn.q_norm", "self_attn.k_norm")),
)
