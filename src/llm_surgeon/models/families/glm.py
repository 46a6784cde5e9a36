"""GLM 4 (dense): a share of each head rotated by neighbours, gate and up in one matrix, norms around the parts."""

from dataclasses import replace

from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA

GLM4 = replace(
    LLAMA,
    model_type="glm4",
    model_class="Glm4ForCausalLM",
    config_class="Glm4Config",
    parts=(
        replace(ATTENTION, interleaved=True),
        replace(FEED_FORWARD, inputs=("mlp.gate_up_proj", "mlp.gate_up_proj")),
    ),
    residual=replace(
        LLAMA.residual,
        norms=(*LLAMA.residual.norms, "post_self_attn_layernorm", "post_mlp_layernorm"),
    ),
)
