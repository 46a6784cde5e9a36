"""Gemma 2 to 4: norms before and after each part of a block, scaled embeddings, windows; caps, or norms of heads."""

from dataclasses import dataclass, replace
from typing import Any

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.families.llama import ATTENTION, FEED_FORWARD, LLAMA
from llm_surgeon.models.parts import PlainLayers

_FEED_FORWARD = replace(FEED_FORWARD, activation="hidden_activation")

_NORMS = (
    *("input_layernorm", "post_attention_layernorm"),
    *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    model_class="Gemma2ForCausalLM",
    config_class="Gemma2Config",
    parts=(ATTENTION, _FEED_FORWARD),
    residual=replace(LLAMA.residual, norms=_NORMS),
)
# The language model by itself; for checkpoints with images see ``towers.py``.
GEMMA3 = replace(
    GEMMA2,
    model_type="gemma3_text",
    model_class="Gemma3ForCausalLM",
    config_class="Gemma3TextConfig",
    parts=(replace(ATTENTION, head_norms=("self_attn.q_norm", "self_attn.k_norm")), _FEED_FORWARD),
)


@dataclass(frozen=True)
class _OwnKeysAndValues(PlainLayers):
    """Attention of Gemma 4, which stays as it is: its heads are wider in some blocks, and may lack values.

    Models with what none of the entry's parts describes are refused.
    """

    def check(self, config: Any, model_type: str) -> None:
        """Check that blocks have no inputs but the stream, and no experts.

        Raises:
            UnsupportedModelError: If they have.
        """
        found = {
            "reads keys and values of earlier blocks, through which gradients pass that no single block shows": (
                config.num_kv_shared_layers
            ),
            "has inputs for each block beside the residual stream": config.hidden_size_per_layer_input,
            "has experts beside its feed-forward parts, with norms of their own": config.enable_moe_block,
        }
        for what, there in found.items():
            if there:
                raise UnsupportedModelError(
                    f"This model of type {model_type!r} {what}.",
                    "Of Gemma 4, models without that can be pruned.",
                )


_READING = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GEMMA4 = replace(
    GEMMA2,
    model_type="gemma4_text",
    model_class="Gemma4ForCausalLM",
    config_class="Gemma4TextConfig",
    parts=(
        _OwnKeysAndValues(
            groups=(_READING, ("self_attn.o_proj",)),
            reading=_READING,
            writing=("self_attn.o_proj",),
            others=("self_attn.q_norm", "self_attn.k_norm"),
        ),
        _FEED_FORWARD,
    ),
    # The configuration of a block is found by its number.
    numbered=True,
)
