"""What a checkpoint may do when it is read: no pickles ever, code of its own only where that is known or allowed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_surgeon.errors import ModelError
from llm_surgeon.export.save import MODELING_FILE, auto_map, export_type, modeling_text
from llm_surgeon.models import FAMILIES

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PART = r"[\w][\w.-]*"
_HUB_ID = re.compile(rf"{_PART}(/{_PART})?")


def check_name(model: str) -> None:
    """Make sure that a model is a directory or can be a hub id, so that no mistyped path is sent to the hub.

    Raises:
        ModelError: If it is neither.
    """
    # Not pathlib, to which the empty path is the working directory and a name too long an error.
    if not (os.path.isdir(model) if os.path.exists(model) else _HUB_ID.fullmatch(model)):
        raise ModelError(
            f"There is no directory {model!r}, and a hub id it is not.",
            "Give a directory that holds a Hugging Face checkpoint, a hub id, or the word demo.",
        )


def check_format(directory: Path) -> None:
    """Make sure that the weights of a local checkpoint are read from safetensors alone.

    Raises:
        ModelError: If they are pickles, which can run code when they are read, or an adapter without its model.
    """
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory} holds an adapter (adapter_config.json), not a model of its own.",
            "Merge it into its model and save that: PeftModel.merge_and_unload().save_pretrained(DIR).",
        )
    index = directory / "model.safetensors.index.json"
    parts = _json(index).get("weight_map") if index.exists() else {}
    listed = {str(part) for part in parts.values()} if isinstance(parts, Mapping) else {str(parts)}
    wrong = sorted(part for part in listed if Path(part).name != part or not part.endswith(".safetensors"))
    if not wrong and not any(directory.glob("*.safetensors")):
        wrong = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if wrong:
        raise ModelError(
            f"{directory} holds its weights in {wrong[0]!r}. Only safetensors are read: reading a pickle can run code.",
            "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW), and copy "
            "the tokenizer.",
        )


def is_own_export(directory: Path) -> bool:
    """Whether all code in a checkpoint is, byte for byte, what an export of this version brings."""
    settings = _json(directory / "config.json")
    family = next((f for f in FAMILIES.values() if export_type(f) == settings.get("model_type")), None)
    if family is None or settings.get("auto_map") != auto_map(family):
        return False
    if "auto_map" in _json(directory / "tokenizer_config.json"):
        return False
    known = modeling_text(family).encode("utf8")
    code = [path for path in directory.rglob("*.py") if path.parent.name != "__pycache__"]
    # Exports of single shots may lie below, and each has the file; transformers looks for code in other places too.
    places = {directory, *(path for path in directory.glob("shot-*") if path.is_dir())}
    in_place = all(path.name == MODELING_FILE and path.parent in places for path in code)
    return in_place and directory / MODELING_FILE in code and all(path.read_bytes() == known for path in code)


def _json(path: Path) -> Mapping[str, Any]:
    """What a file of JSON says; nothing if there is none, or none that can be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
