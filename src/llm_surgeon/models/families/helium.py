"""Helium: Llama's layout with neighbouring dimensions rotated together."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA

HELIUM = replace(
    LLAMA,
    model_type="helium",
    model_class="HeliumForCausalLM",
    config_class="HeliumConfig",
    # The output projection is as wide as the hidden size, whatever the number of heads.
    parts=(replace(ATTENTION, interleaved=True, free_heads=False), FEED_FORWARD),
)
