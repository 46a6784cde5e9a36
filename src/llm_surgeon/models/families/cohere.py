"""Command R7B and A (Cohere 2): both parts read one norm, neighbours rotated in blocks with windows, scaled logits."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA

COHERE2 = replace(
    LLAMA,
    model_type="cohere2",
    model_class="Cohere2ForCausalLM",
    config_class="Cohere2Config",
    parts=(replace(ATTENTION, interleaved=True, free_heads=False), FEED_FORWARD),
    residual=replace(LLAMA.residual, norms=("input_layernorm",)),
)
