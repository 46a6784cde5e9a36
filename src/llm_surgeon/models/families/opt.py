"""OPT: biases throughout, LayerNorm, learned positions, ReLU."""

from llm_surgeon.models.family import Family, Residual
from llm_surgeon.models.parts import Attention, FeedForward

OPT = Family(
    model_type="opt",
    model_class="OPTForCausalLM",
    config_class="OPTConfig",
    blocks="model.decoder.layers",
    parts=(
        Attention(
            module="self_attn",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.out_proj",
            rotary=False,
            counts=(("num_heads", "heads"),),
            free_heads=False,
        ),
        FeedForward(inputs=("fc1",), output="fc2", activation="activation_function", width="ffn_dim"),
    ),
    residual=Residual(
        tokens="model.decoder.embed_tokens",
        positions="model.decoder.embed_positions",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        final_norm="model.decoder.final_layer_norm",
        project_in="model.decoder.project_in",
        project_out="model.decoder.project_out",
    ),
)
