"""GPT-NeoX and Pythia: queries, keys and values of a head together in one matrix, a share of each head rotated."""

from llm_surgeon.models.family import Family, Residual
from llm_surgeon.models.parts import Attention, FeedForward

GPT_NEOX = Family(
    model_type="gpt_neox",
    model_class="GPTNeoXForCausalLM",
    config_class="GPTNeoXConfig",
    blocks="gpt_neox.layers",
    parts=(
        Attention(
            module="attention",
            query="attention.query_key_value",
            key="attention.query_key_value",
            value="attention.query_key_value",
            output="attention.dense",
            rotary=True,
            layout="by head",
            free_heads=False,
        ),
        FeedForward(inputs=("mlp.dense_h_to_4h",), output="mlp.dense_4h_to_h", activation="hidden_act"),
    ),
    residual=Residual(
        tokens="gpt_neox.embed_in",
        norms=("input_layernorm", "post_attention_layernorm"),
        final_norm="gpt_neox.final_layer_norm",
    ),
)
