"""Model families, and the linear layers of a model as prunable matrices."""

from __future__ import annotations

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.family import Anatomy, Family, LinearLayer, examine
from llm_surgeon.models.gemma import GEMMA2, GEMMA3
from llm_surgeon.models.llama import LLAMA
from llm_surgeon.models.mistral import MISTRAL
from llm_surgeon.models.opt import OPT
from llm_surgeon.models.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OPT)
}

__all__ = ["FAMILIES", "Anatomy", "Family", "LinearLayer", "examine", "family_of"]


def family_of(model_type: str) -> Family:
    """The family of ``config.model_type``.

    Raises:
        UnsupportedModelError: If there is no entry for its ``model_type``.
    """
    if model_type.startswith("llm_surgeon_"):
        raise UnsupportedModelError(
            "This checkpoint has been pruned by llm-surgeon already.",
            "Prune the dense checkpoint again, with the sparsity that you want in the end.",
        )
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"Models of type {model_type!r} are not supported; supported are {', '.join(sorted(FAMILIES))}.",
            "To add the type, describe its blocks in one `Family` entry in llm_surgeon/models (see opt.py there), list "
            "it in FAMILIES, and run tests/models/test_contract.py.",
        )
    return FAMILIES[model_type]
