"""GPT-2: transposed layers, queries, keys and values in one matrix, learned positions."""

from llm_surgeon.models.family import Family, Residual
from llm_surgeon.models.parts import Attention, FeedForward

GPT2 = Family(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    config_class="GPT2Config",
    blocks="transformer.h",
    parts=(
        Attention(
            module="attn",
            query="attn.c_attn",
            key="attn.c_attn",
            value="attn.c_attn",
            output="attn.c_proj",
            rotary=False,
            layout="stacked",
            counts=(("split_size", "width"),),
            free_heads=False,
        ),
        FeedForward(inputs=("mlp.c_fc",), output="mlp.c_proj", activation="activation_function", width="n_inner"),
    ),
    residual=Residual(
        tokens="transformer.wte", positions="transformer.wpe", norms=("ln_1", "ln_2"), final_norm="transformer.ln_f"
    ),
    transposed=True,
)
