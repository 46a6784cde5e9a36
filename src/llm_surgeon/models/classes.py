"""Classes of models: those of transformers that load a checkpoint, and those that can be exported."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models import FAMILIES
from llm_surgeon.models.modeling_text import export_type


def auto_class(model_type: str) -> str:
    """Name of the class in transformers that loads checkpoints of a type: as its entry says, or the usual one.

    Args:
        model_type: ``config.model_type``, which may be that of an export.
    """
    known = (family for family in FAMILIES.values() if model_type in (family.model_type, export_type(family)))
    return next((family.auto_class for family in known), "AutoModelForCausalLM")


def auto_model(model_type: str) -> Any:
    """The class that ``auto_class`` names."""
    return getattr(transformers, auto_class(model_type))


def check_class(model: PreTrainedModel, model_class: str) -> None:
    """Make sure that a model is of the class that its export will be of.

    Args:
        model: A model of a supported type.
        model_class: The class in its family's entry.

    Raises:
        UnsupportedModelError: If the model is of another class, or is run by code of its checkpoint.
    """
    if model.config.model_type not in CONFIG_MAPPING:
        # A type that the user has registered: its entry names the class.
        return
    kinds = type(model).__mro__
    named = next((kind for kind in kinds if kind.__name__ == model_class), None)
    if named is None:
        raise UnsupportedModelError(
            f"The model is a {type(model).__name__}, and pruned models are written as {model_class}.",
            "Load it with AutoModelForCausalLM instead.",
        )
    if any(kind.__module__.startswith("transformers_modules") for kind in kinds):
        raise UnsupportedModelError(
            f"The model is run by code that its checkpoint brings ({type(model).__name__}), and its export would be "
            f"run by transformers' own {model_class}.",
            "Leave --trust-remote-code out, so that transformers' own class is pruned.",
        )
