"""ERNIE 4.5 (dense): Llama's layout with neighbouring dimensions rotated together."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA

ERNIE4_5 = replace(
    LLAMA,
    model_type="ernie4_5",
    model_class="Ernie4_5ForCausalLM",
    config_class="Ernie4_5Config",
    parts=(replace(ATTENTION, interleaved=True), FEED_FORWARD),
)
