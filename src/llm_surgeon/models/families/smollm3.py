"""SmolLM3: Llama's layout, with rotary embeddings in some blocks only."""

from dataclasses import replace

from llm_surgeon.models.families.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    model_class="SmolLM3ForCausalLM",
    config_class="SmolLM3Config",
    per_block=("layer_types", "no_rope_layers"),
)
