"""Text towers: language models inside models that also read images; the other towers stay as they are."""

from dataclasses import replace

from llm_surgeon.models.families.gemma import GEMMA3, GEMMA4
from llm_surgeon.models.families.mistral import MISTRAL
from llm_surgeon.models.families.qwen import QWEN3, QWEN3_5, QWEN3_5_MOE
from llm_surgeon.models.family import Family


def _tower(text: Family, model_type: str, name: str, *, numbered: bool = False) -> Family:
    """Entry of a model with the blocks of another family's language model.

    Args:
        text: Entry of the language model by itself.
        model_type: ``config.model_type`` of the model as a whole.
        name: Beginning of the names of its classes.
        numbered: See ``Family``.
    """
    inside = "model.language_model"
    return replace(
        text,
        model_type=model_type,
        model_class=f"{name}ForConditionalGeneration",
        config_class=f"{name}Config",
        blocks=f"{inside}.layers",
        residual=replace(text.residual, tokens=f"{inside}.embed_tokens", final_norm=f"{inside}.norm"),
        text_config="text_config",
        auto_class="AutoModelForImageTextToText",
        numbered=numbered,
    )


GEMMA3_TOWER = _tower(GEMMA3, "gemma3", "Gemma3")
# The tower is a Mistral (Mistral Small 3.1 and 3.2) or a Ministral 3, whose layers have the same names.
MISTRAL3_TOWER = _tower(MISTRAL, "mistral3", "Mistral3")
# The first blocks are handed features of the image, by their numbers (DeepStack).
QWEN3_VL_TOWER = _tower(QWEN3, "qwen3_vl", "Qwen3VL", numbered=True)
GEMMA4_TOWER = _tower(GEMMA4, "gemma4", "Gemma4", numbered=True)
QWEN3_5_TOWER = _tower(QWEN3_5, "qwen3_5", "Qwen3_5")
QWEN3_5_MOE_TOWER = _tower(QWEN3_5_MOE, "qwen3_5_moe", "Qwen3_5Moe")
