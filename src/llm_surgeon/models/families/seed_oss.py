"""Seed-OSS: Llama's layout, with biases on queries, keys and values."""

from dataclasses import replace

from llm_surgeon.models.families.llama import LLAMA

SEED_OSS = replace(LLAMA, model_type="seed_oss", model_class="SeedOssForCausalLM", config_class="SeedOssConfig")
