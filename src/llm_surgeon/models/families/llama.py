"""Llama and what shares its layout (SmolLM2, ...): gated feed-forward, rotary grouped-query attention."""

from llm_surgeon.models.family import Attention, Family, FeedForward, Residual

LLAMA = Family(
    model_type="llama",
    model_class="LlamaForCausalLM",
    config_class="LlamaConfig",
    blocks="model.layers",
    attention=Attention(
        module="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        rotary=True,
        counts=(("num_key_value_groups", "shared"),),
    ),
    feed_forward=FeedForward(inputs=("mlp.gate_proj", "mlp.up_proj"), output="mlp.down_proj", activation="hidden_act"),
    residual=Residual(
        tokens="model.embed_tokens",
        norms=("input_layernorm", "post_attention_layernorm"),
        final_norm="model.norm",
    ),
)
