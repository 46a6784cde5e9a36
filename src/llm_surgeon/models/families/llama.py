"""Llama and what shares its layout (SmolLM2, ...): gated feed-forward, rotary grouped-query attention."""

from llm_surgeon.models.family import Family, Residual
from llm_surgeon.models.parts import Attention, FeedForward

ATTENTION = Attention(
    module="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    rotary=True,
    counts=(("num_key_value_groups", "shared"),),
)
FEED_FORWARD = FeedForward(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj", activation="hidden_act")
LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    config_class="LlamaConfig",
    blocks="model.layers",
    parts=(ATTENTION, FEED_FORWARD),
    residual=Residual(
        tokens="model.embed_tokens",
        norms=("input_layernorm", "post_attention_layernorm"),
        final_norm="model.norm",
    ),
)
