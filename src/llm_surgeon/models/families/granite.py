"""Granite (dense): Llama's layout, with factors of embeddings, scores, parts and logits."""

from dataclasses import replace

from llm_surgeon.models.families.llama import LLAMA

GRANITE = replace(
    LLAMA,
    model_type="granite",
    model_class="GraniteForCausalLM",
    config_class="GraniteConfig",
    residual=replace(LLAMA.residual, multiplier="residual_multiplier"),
)
