"""Mistral: Llama's layout, with windows in its attention."""

from dataclasses import replace

from llm_surgeon.models.families.llama import LLAMA

MISTRAL = replace(LLAMA, model_type="mistral", model_class="MistralForCausalLM", config_class="MistralConfig")
