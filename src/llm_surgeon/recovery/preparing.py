"""Preconditions of a recovery: two models that predict the same tokens, and room for the training."""

from __future__ import annotations

import gc
import importlib.util
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.errors import ConfigError
from llm_surgeon.models.family import Family
from llm_surgeon.recipe.recovery import RecoverConfig
from llm_surgeon.system.memory import available_bytes
from llm_surgeon.system.processes import Processes

# Bytes of each trained weight: its value, its gradient and two moments, in float32.
TRAINED_BYTES = 4 * 4


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Make sure that a teacher's tokens are the student's.

    Raises:
        ConfigError: If they are not.
    """
    if student.get_vocab() != teacher.get_vocab():
        raise ConfigError(
            f"The tokenizer of {name} has other tokens than the export's, so that its predictions say nothing of "
            "these.",
            "Give the model that the export was made of.",
        )


def check_same_vocabulary(student: Any, teacher: Any, name: str) -> None:
    """Make sure that two models predict as many tokens.

    Args:
        student: Configuration of the one.
        teacher: Configuration of the other.
        name: Name of the other.

    Raises:
        ConfigError: If they do not.
    """
    own, other = (settings.get_text_config().vocab_size for settings in (student, teacher))
    if own != other:
        raise ConfigError(
            f"{name} predicts {other:,} tokens, and the export {own:,}.", "Give the model that the export was made of."
        )


def check_shares(config: RecoverConfig, processes: Processes) -> None:
    """Make sure that all processes have as many sequences of a step.

    Raises:
        ConfigError: If they do not.
    """
    if config.batch_size % processes.count:
        raise ConfigError(
            f"{config.batch_size} sequences of a step (--batch-size) cannot be shared out among {processes.count} "
            "processes.",
            f"Give a multiple of {processes.count}.",
        )


def as_trained(model: PreTrainedModel, family: Family) -> None:
    """Give the language model of a model the type in which it is trained: float32, as small steps are lost in others.

    Towers that read no text stay as they are, and are not trained.

    Args:
        model: The model.
        family: Entry of its architecture.
    """
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        if family.text_config is None or name.startswith(f"{family.tower}.") or id(parameter) in head:
            parameter.data = parameter.data.float()
        else:
            parameter.requires_grad_(False)


def check_adapters(config: RecoverConfig) -> None:
    """Check that adapters are possible, if the recipe has any.

    Raises:
        ConfigError: If the optional package ``peft`` is not installed.
    """
    if config.adapters is not None and importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "Adapters need the package peft, which is not installed.",
            'Install it with `pip install "llm-surgeon[lora]"`, or train all weights.',
        )


def check_memory(
    trained: int, stored: int, teacher: int, config: RecoverConfig, device: torch.device, processes: Processes
) -> None:
    """Make sure that the memory that a training needs in any case is there, before a model is loaded.

    Args:
        trained: Number of weights of the export.
        stored: Bytes of them in its files.
        teacher: Bytes of the dense model's weights in its files, 0 without one.
        config: The recipe.
        device: Device of this process.
        processes: Processes that share the weights.

    Raises:
        ConfigError: If it is not.
    """
    # Freed memory of a pruning run in the same process counts as free.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    own = TRAINED_BYTES * trained if config.adapters is None else stored
    needed, free = (own + teacher) // processes.count, available_bytes(device)
    if needed > free:
        raise ConfigError(
            f"Training {trained:,} weights needs {needed / 2**30:,.1f} GiB beside the activations, and "
            f"{free / 2**30:,.1f} GiB are free.",
            "Train adapters (--adapters 16), or share the work among several processes with torchrun.",
        )


def recompute_activations(blocks: nn.ModuleList) -> None:
    """Let blocks compute their activations again in the backward pass, as they keep none but their inputs."""
    for block in blocks:
        block.forward = _again(block.forward)


def _again(forward: Any) -> Any:
    def computed_again(*args: Any, **settings: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **settings)
        return checkpoint(forward, *args, use_reentrant=False, **settings)

    return computed_again
