"""StarCoder 2: rotary grouped-query attention, LayerNorm, biases throughout, one first layer."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, LLAMA
from llm_surgeon.models.parts import FeedForward

STARCODER2 = replace(
    LLAMA,
    model_type="starcoder2",
    model_class="Starcoder2ForCausalLM",
    config_class="Starcoder2Config",
    parts=(ATTENTION, FeedForward(inputs=("mlp.c_fc",), output="mlp.c_proj", activation="hidden_act")),
)
