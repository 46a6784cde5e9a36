"""Tensors that a run has left alone, as they stand in the files of the dense checkpoint.

A run has all weights in one type, the one that ``--dtype`` names. The towers beside the language model are none of its
business: an export has them in the type in which they came, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from llm_surgeon.models.family import Family
from llm_surgeon.models.permutation import head_path

_WEIGHTS = "model.safetensors"
# Most that loading in bfloat16 or float16 rounds: a share of each number, and an amount for the smallest.
_ROUNDED, _SMALLEST = 2**-7, 1e-6


def stored_towers(model: PreTrainedModel, family: Family, source: Path) -> dict[str, Tensor]:
    """Tensors outside the language model with the bits that they have in the files, by their names in the model.

    A tensor is left out if the class makes it of several stored ones, or if its numbers are others by now.

    Args:
        model: A model that was loaded from the checkpoint.
        family: Entry of the model's architecture.
        source: Directory of the checkpoint.
    """
    inside = (f"{family.tower}.", f"{head_path(model)}.")
    loaded = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    names = _names_in_files(model, loaded)
    found = {}
    for in_file, tensor in _read(source, names.keys() | loaded.keys()):
        name = names.get(in_file, in_file)
        if _is_rounded(tensor, loaded[name].cpu()):
            found[name] = tensor
    return found


def _is_rounded(stored: Tensor, loaded: Tensor) -> bool:
    """Whether a tensor in memory is a stored one, up to the rounding to the types in between."""
    if stored.shape != loaded.shape:
        return False
    return torch.allclose(loaded.float(), stored.float(), rtol=_ROUNDED, atol=_SMALLEST, equal_nan=True)


def _names_in_files(model: PreTrainedModel, loaded: dict[str, Tensor]) -> dict[str, str]:
    """Names in the model by those in the files: transformers changes some names when it loads."""
    by_tensor = {id(tensor): name for name, tensor in loaded.items()}
    reverted = revert_weight_conversion(model, dict(loaded))
    return {name: by_tensor[id(tensor)] for name, tensor in reverted.items() if id(tensor) in by_tensor}


def _read(source: Path, names: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of some names that the weight files of a checkpoint have."""
    index = source / f"{_WEIGHTS}.index.json"
    parts = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values() if index.exists() else [_WEIGHTS]
    for part in sorted(set(parts)):
        with safe_open(source / part, framework="pt") as file:
            for name in sorted(names.intersection(file.keys())):
                yield name, file.get_tensor(name)
