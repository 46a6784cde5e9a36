"""Models: the families that are supported, loading, and the linear layers of a model as prunable matrices.

This package knows how a model is built and stored. It reads no text and estimates no curvature.
"""

from __future__ import annotations

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.anatomy import Anatomy, LinearLayer, examine
from llm_surgeon.models.families.cohere import COHERE2
from llm_surgeon.models.families.ernie import ERNIE4_5
from llm_surgeon.models.families.exaone import EXAONE4
from llm_surgeon.models.families.gemma import GEMMA2, GEMMA3, GEMMA4
from llm_surgeon.models.families.glm import GLM4
from llm_surgeon.models.families.gpt2 import GPT2
from llm_surgeon.models.families.gpt_neox import GPT_NEOX
from llm_surgeon.models.families.granite import GRANITE
from llm_surgeon.models.families.helium import HELIUM
from llm_surgeon.models.families.hunyuan import HUNYUAN_V1_DENSE
from llm_surgeon.models.families.llama import LLAMA
from llm_surgeon.models.families.mistral import MINISTRAL3, MISTRAL
from llm_surgeon.models.families.mixtures import DEEPSEEK_V3, GLM4_MOE, GPT_OSS, MIXTRAL, QWEN3_MOE
from llm_surgeon.models.families.olmo import OLMO2, OLMO3
from llm_surgeon.models.families.opt import OPT
from llm_surgeon.models.families.phi3 import PHI3
from llm_surgeon.models.families.qwen import QWEN2, QWEN3, QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT
from llm_surgeon.models.families.seed_oss import SEED_OSS
from llm_surgeon.models.families.smollm3 import SMOLLM3
from llm_surgeon.models.families.starcoder2 import STARCODER2
from llm_surgeon.models.families.towers import (
    GEMMA3_TOWER,
    GEMMA4_TOWER,
    MISTRAL3_TOWER,
    QWEN3_5_MOE_TOWER,
    QWEN3_5_TOWER,
    QWEN3_VL_TOWER,
)
from llm_surgeon.models.family import Family
from llm_surgeon.models.modeling_text import export_type

_ENTRIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, OPT, GPT2, GPT_NEOX),
    *(SMOLLM3, SEED_OSS, MINISTRAL3, HUNYUAN_V1_DENSE, EXAONE4, STARCODER2, GRANITE, OLMO2, OLMO3, GLM4),
    *(ERNIE4_5, COHERE2, HELIUM, QWEN3_5, QWEN3_MOE, MIXTRAL, GLM4_MOE, DEEPSEEK_V3, GPT_OSS),
    *(QWEN3_NEXT, QWEN3_5_MOE, GEMMA4),
    *(GEMMA3_TOWER, MISTRAL3_TOWER, QWEN3_VL_TOWER, QWEN3_5_TOWER, QWEN3_5_MOE_TOWER),
    GEMMA4_TOWER,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ENTRIES}

__all__ = [
    "FAMILIES",
    "Anatomy",
    "Family",
    "LinearLayer",
    "examine",
    "family_of",
    "pruned_family_of",
    "register_family",
]


def register_family(family: Family) -> None:
    """Register an architecture that the package has no entry for, under its ``model_type``.

    Raises:
        ValueError: If there is an entry for this ``model_type`` already.
    """
    if family.model_type in FAMILIES:
        raise ValueError(f"there is a family {family.model_type!r} already")
    FAMILIES[family.model_type] = family


def pruned_family_of(model_type: str) -> Family:
    """Family of a ``config.model_type``, which may be that of an export.

    Raises:
        UnsupportedModelError: If there is no entry for the ``model_type``.
    """
    return next((f for f in FAMILIES.values() if export_type(f) == model_type), None) or family_of(model_type)


def family_of(model_type: str) -> Family:
    """Family of a ``config.model_type``.

    Raises:
        UnsupportedModelError: If there is no entry for the ``model_type``, or it is that of a pruned model.
    """
    if model_type.startswith("llm_surgeon_"):
        raise UnsupportedModelError(
            "This checkpoint has been pruned by llm-surgeon already.",
            "Prune the dense checkpoint again, with the sparsity that you want in the end.",
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"Models of type {model_type!r} are not supported; supported are {', '.join(sorted(FAMILIES))}.",
            "To add the type, describe its blocks in one `Family` and hand it to `register_family`: see "
            "docs/families.md, and opt.py in llm_surgeon/models for an example.",
        )
    return FAMILIES[model_type]
