"""Gemma 2 and 3: norms before and after each part of a block, scaled embeddings, windows; caps, or norms of heads."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA

_FEED_FORWARD = replace(FEED_FORWARD, activation="hidden_activation")

_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    model_class="Gemma2ForCausalLM",
    config_class="Gemma2Config",
    parts=(ATTENTION, _FEED_FORWARD),
    residual=replace(LLAMA.residual, norms=_NORMS),
)
# The language model by itself; for checkpoints with images see ``towers.py``.
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    model_class="Gemma3ForCausalLM",
    config_class="Gemma3TextConfig",
    parts=(replace(ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm")), _FEED_FORWARD),
)
