"""Mistral and Ministral 3: Llama's layout, with windows in the attention, or queries scaled by their position."""

from dataclasses import replace

from llm_surgeon.models.families.llama import LLAMA

MISTRAL = replace(LLAMA, model_type="mistral", model_class="MistralForCausalLM", config_class="MistralConfig")
# The language model by itself; for checkpoints with images see ``towers.py``.
MINISTRAL3 = replace(
    LLAMA, model_type="ministral3", model_class="Ministral3ForCausalLM", config_class="Ministral3Config"
)
