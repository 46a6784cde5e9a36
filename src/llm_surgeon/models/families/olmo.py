"""OLMo 2 and 3: norms over all heads, and norms of the parts' outputs in place of their inputs."""

from dataclasses import replace

from llm_surgeon.models.families.llama import FEED_FORWARD, LLAMA
from llm_surgeon.models.parts import JointlyNormedAttention

_ATTENTION = JointlyNormedAttention(
    module="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    rotary=True,
    joint_norms=("self_attn.q_norm", "self_attn.k_norm"),
)
OLMO2 = replace(
    LLAMA,
    model_type="olmo2",
    model_class="Olmo2ForCausalLM",
    config_class="Olmo2Config",
    parts=(_ATTENTION, FEED_FORWARD),
    residual=replace(LLAMA.residual, norms=("post_attention_layernorm", "post_feedforward_layernorm")),
)
# With windows in most blocks.
OLMO3 = replace(OLMO2, model_type="olmo3", model_class="Olmo3ForCausalLM", config_class="Olmo3Config")
