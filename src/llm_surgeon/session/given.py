"""Checks of the model, tokenizer and options from a caller of the Python API, and the model's mode during a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.errors import ConfigError, UnsupportedModelError
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.norms import cast_layer_norms
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.grouping import flat
from llm_surgeon.system.progress import Progress, RichProgress


def as_recipe(config: Any, options: Mapping[str, Any] | None = None) -> PruneConfig:
    """A recipe as it is given: one, a mapping of its options, or None for the default.

    Args:
        config: The recipe.
        options: Options by name, which go before those of ``config``.

    Raises:
        ConfigError: If it is neither, or not valid.
    """
    if config is not None and not isinstance(config, PruneConfig | Mapping):
        raise ConfigError(
            f"The recipe is a {type(config).__name__}, not a PruneConfig.",
            "Give PruneConfig(sparsity=...), or options by name: sparsity=0.2.",
        )
    if isinstance(config, PruneConfig):
        if not options:
            return config
        config = _asked(config)
    return PruneConfig.from_mapping(dict(flat(config or {})) | dict(options or {}))


def _asked(config: PruneConfig) -> dict[str, Any]:
    """Options of a recipe that do not follow from its others: presets and methods bring options that new ones may not.

    ``model_fields_set`` has both kinds, as defaults that depend on other options are filled in before the validation.
    """
    asked = {name: getattr(config, name) for name in config.model_fields_set}
    for name in sorted(asked):
        rest = {other: value for other, value in asked.items() if other != name}
        with contextlib.suppress(ConfigError):
            if PruneConfig.from_mapping(rest).model_dump() == config.model_dump():
                asked = rest
    return asked


def as_progress(progress: Any) -> Progress | None:
    """A display of progress as it is given: one, True for bars, or None or False for none.

    Raises:
        ConfigError: If it is none of these.
    """
    if progress is None or isinstance(progress, bool):
        return RichProgress() if progress else None
    if not callable(getattr(progress, "phase", None)):
        raise ConfigError(
            f"The progress is a {type(progress).__name__}, which has no phases.", "Give progress=True, or leave it out."
        )
    return cast(Progress, progress)


def as_path(out: Any) -> Path:
    """Output directory from a caller's argument: a path or a string.

    Raises:
        ConfigError: If the argument is neither.
    """
    if not isinstance(out, str | Path):
        raise ConfigError(f"The output is a {type(out).__name__}, not a path.", "Give out='...', a new directory.")
    return Path(out)


def check_model(model: Any) -> None:
    """Make sure that an object is a causal language model of transformers that can be run here.

    Raises:
        UnsupportedModelError: If the object is not such a model; says what to give instead.
    """
    kind = type(model).__name__
    if isinstance(model, str):
        raise UnsupportedModelError(
            f"{model!r} is a name, not a model.", "Call prune_checkpoint, or load it first: llm_surgeon.load."
        )
    if hasattr(model, "peft_config") or hasattr(model, "merge_and_unload"):
        raise UnsupportedModelError(
            f"The model is a {kind} with adapters.", "Give what merge_and_unload() returns: a model of its own."
        )
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModelError(f"The model is compiled ({kind}).", "Give the model that was compiled.")
    if not isinstance(model, PreTrainedModel):
        inner = "its .module" if isinstance(getattr(model, "module", None), nn.Module) else "such a model"
        raise UnsupportedModelError(
            f"The model is a {kind}, not a model of transformers.", f"Give {inner}, from AutoModelForCausalLM."
        )
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{kind} has no head that predicts tokens.", "Load it with AutoModelForCausalLM instead."
        )
    if next(model.parameters()).device.type == "meta":
        raise UnsupportedModelError("The model has no weights (device meta).", "Load it with its weights.")


def check_modules(model: PreTrainedModel, exported: bool) -> None:
    """Make sure that nothing but its modules and weights decides what a model computes.

    Args:
        model: The model.
        exported: Whether the model is to be exported: an export has modules and weights, and no hooks.

    Raises:
        UnsupportedModelError: If masks, parametrisations or hooks change the model, or its weights are float64; says
            how to undo that.
    """
    for name, module in model.named_modules():
        if prune.is_pruned(module) and not any(module.children()):
            raise UnsupportedModelError(
                f"{name} is masked by torch.nn.utils.prune.", "Make that permanent first: torch.nn.utils.prune.remove."
            )
        if parametrize.is_parametrized(module):
            raise UnsupportedModelError(
                f"{name} is parametrised.", "Undo that first: torch.nn.utils.parametrize.remove_parametrizations."
            )
        if exported and (module._forward_hooks or module._forward_pre_hooks):
            raise UnsupportedModelError(
                f"{name or type(model).__name__} has hooks, which no export can have.", "Remove them first."
            )
    if model.dtype == torch.float64:
        raise UnsupportedModelError("The weights are float64, and sums are float32.", "Call model.float() first.")


def check_layers_apart(model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Make sure that no two prunable layers are the same module, or have the same weights.

    Raises:
        UnsupportedModelError: If two layers share their weights: each is pruned in its own way.
    """
    seen: dict[tuple[int, int], str] = {}
    for name in anatomy.layers:
        module = model.get_submodule(name)
        weight = cast(nn.Linear, module).weight
        other = seen.setdefault((weight.data_ptr(), weight.numel()), name)
        if other != name:
            raise UnsupportedModelError(
                f"{other} and {name} share their weights.", "Give each its own: copy.deepcopy of the shared module."
            )


def check_tokenizer(tokenizer: Any) -> None:
    """Make sure that an object is a tokenizer of transformers.

    Raises:
        ConfigError: If the object is no tokenizer.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        inner = " Of a processor, give its .tokenizer." if hasattr(tokenizer, "tokenizer") else ""
        raise ConfigError(
            f"The tokenizer is a {type(tokenizer).__name__}.",
            f"Give a tokenizer of transformers, from AutoTokenizer.from_pretrained.{inner}",
        )


def check_surroundings(model: PreTrainedModel) -> None:
    """Make sure that no mode of torch around the call keeps gradients or float32 sums away.

    Raises:
        ConfigError: If ``torch.inference_mode`` or ``torch.autocast`` is on, or the model was loaded in the former.
    """
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise ConfigError(
            "In torch.inference_mode there are no gradients, also not of models that were loaded in it.",
            "Load the model and call this outside of it.",
        )
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        raise ConfigError(
            f"torch.autocast is on for {device}, which would round the sums.",
            "Call this outside of it: precision='bfloat16' uses autocast where that does no harm.",
        )


@contextlib.contextmanager
def ready(model: PreTrainedModel) -> Iterator[None]:
    """Put a model into evaluation mode, with named results and norms for any input; restores it afterwards.

    Modules that are new by then get the mode of the whole model.
    """
    modes = {module: module.training for module in model.modules()}
    named, norms = model.config.return_dict, cast_layer_norms(model)
    model.eval()
    model.config.return_dict = True
    try:
        # A caller may be under no_grad, in which there would be no curvature.
        with torch.enable_grad():
            yield
    finally:
        model.config.return_dict = named
        for module in norms:
            module.__class__ = nn.LayerNorm
        whole = modes[model]
        for module in model.modules():
            module.training = modes.get(module, whole)
