"""Phi-3: Llama's layout with queries, keys and values in one matrix, and gate and up in another."""

from dataclasses import replace

from llm_surgeon.models.families.llama import FEED_FORWARD, LLAMA
from llm_surgeon.models.parts import Attention

PHI3 = replace(
    LLAMA,
    model_type="phi3",
    model_class="Phi3ForCausalLM",
    config_class="Phi3Config",
    parts=(
        Attention(
            module="self_attn",
            query="self_attn.qkv_proj",
            key="self_attn.qkv_proj",
            value="self_attn.qkv_proj",
            output="self_attn.o_proj",
            rotary=True,
            layout="stacked",
            counts=(
                ("num_key_value_groups", "shared"),
                ("num_key_value_heads", "key/value heads"),
                ("config.num_attention_heads", "heads"),
            ),
            # Its configuration checks the factors of long rotary embeddings against hidden size over heads.
            free_heads=False,
        ),
        replace(FEED_FORWARD, inputs=("mlp.gate_up_proj", "mlp.gate_up_proj")),
    ),
)
