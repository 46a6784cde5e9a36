"""Trust in checkpoints: no pickle is ever read, and code of a checkpoint runs only where it is known or allowed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from llm_surgeon.errors import ModelError
from llm_surgeon.models import FAMILIES
from llm_surgeon.models.modeling_text import (
    BLOCK_CONFIGS_FILE,
    MODELING_FILE,
    Brought,
    auto_map,
    block_configs_text,
    export_type,
    modeling_text,
)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# SHA-256 of the modelling files that former versions of this package wrote, one for each family.
_FORMER = (
    "2bc59aadce47111cd891d3d9d4e7531f92040943e30af07b5f1ca16ee1260d80",
    "1f7ee72b61badace8730d0225392a81eac387cc69b2ab893b92dabe2fede0d2a",
    "ed032979ec912fc6352f2e795e80b8f780684144e0e018ba1692235bf0cd37bb",
    "ede0139c356599e75617a8c58909aad218fe92f62d13a945fbac7f08632ef9fc",
    "83e5016f7e31a0c112183e309f948023999b63b00f14611b0b71531dedbb2665",
    "fbfd5a1c85561413f5961a2f736eae27e969e39215682dc2aa385e3bd5e577bb",
    "d4a753c6f0446a8a6e295d85500af6bb7e8de79c5f4c1c60db2f460fb568c2d8",
    "91131b9f93373711c0fde75e288e3cf0b518fe912bf87a6a67278b8bade40ef8",
    "0ced41ca0c7636eb3875bd1c92be431c6faf76135ed9a481cef71de83ea01e8a",
    "5685854308d6d9b0dc81146451f3f60f19b4300336d1922e308f5e27e03623da",
    "4d1245b1e6667bd83815c958bba9b0c3097b6101a59fc05e926b01bc8db8ba51",
    "c83d59c37818b164d518f13ccf5c994d8119da42f2e257bd6e15b79ccdbb9fde",
    "54d4781099ce2ee06e1efdf9242e69f9267dd58fe11b2c400783844b404d77aa",
    "a1fc2ce5dcc4409f0b07d34bf4ae7a5ab2ff0a0c38f895fdc6fd70224bc670d1",
    "d6da46c529a51e6ad03b671e6457767fc7b856eb6f1e832537c029a838e1073e",
    "7671ff5139f182acac76d51b1f7af7ba7214f4f7233017aef0d75dd915bf04b8",
    "9f3bc8c25213a564739bbbf24a931ea19d11eb41c363fbb9b7d0372ac26750d5",
    "143d75a138f59142180445f9395b2acd3e9e8db595cf9cddac6d528d40bcda8f",
    "623b9c7c376af1a237c51f8b05e4fdb7205fef1d4e4139eccf04a944e19b2262",
    "7afa5a8689f0f6c8f3ea37e1218e6981eacd91eea4a0897790f63a52a1e0c91f",
    "e8b24efeb3b7d7802cee58400c606c8444513a3b08d278164c2a6508d73a0b24",
    "d91c04f520637f8e8ab1de0d771295788994c9bccfc638547184b197a30ac310",
    "9d03ed09b5a7e06f015ed409cae0a01b38a741bd5c4dc3cbec71a0dfb6a37f7b",
    "1ef03cc42ecb680b4e4ea480da41e50b5d91b858b8c905f78288ac3255344d0d",
    "6538cb98ab12bc7d086c492ea4149deda2518fa506c6c08ac05b9e4f5ca497ab",
    "2daad07263b60233c3cc92482804af71ecf463680c6c933b5abdc5c8a09f05db",
    "7d284a0363de752ee652f2a8465a5bce7a42c88b4c7d61e6ea72eadd0c1b3349",
    "ee5782a953c83410ddb3e09827cc382687541a675bb4f82b345dd70358df6956",
    "4ab35112c31b46fc984bbc8d10e6685736593e971a4a4f430d71ceab34defb21",
    "7510926133388f3fa420a5036d9dd4198d61da823b07fe6f1b635ccb55f781ad",
)
# Directory of the format of that name within an export.
_NEMOTRON_NAS = "nemotron-nas"
_PART = r"[\w][\w.-]*"
_HUB_ID = re.compile(rf"{_PART}(/{_PART})?")


def check_name(model: str) -> None:
    """Make sure that a model is a directory or can be a hub id, so that no mistyped path is sent to the hub.

    Raises:
        ModelError: If the name is neither.
    """
    # pathlib is not used here: it takes the empty path for the working directory, and a name too long is an error.
    if os.path.lexists(model) and not os.path.isdir(model):
        kind = "a file" if os.path.exists(model) else "a link that leads nowhere"
        raise ModelError(f"{model!r} is {kind}, not a directory.", "Give the directory that holds the checkpoint.")
    if not (os.path.isdir(model) if os.path.exists(model) else _HUB_ID.fullmatch(model)):
        raise ModelError(
            f"There is no directory {model!r}, and a hub id it is not.",
            "Give a directory that holds a Hugging Face checkpoint, a hub id, or the word demo.",
        )


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights, or parts of them, in whatever format."""
    patterns = ("*.safetensors*", *_PICKLES, "adapter_config.json")
    return any(True for pattern in patterns for _ in directory.glob(pattern))


def check_format(directory: Path) -> None:
    """Make sure that the weights of a local checkpoint are read from safetensors alone.

    Raises:
        ModelError: If the weights are pickles, which can run code when they are read, or the checkpoint is an adapter
            without its model.
    """
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory} holds an adapter (adapter_config.json), not a model of its own.",
            "Merge it into its model and save that: PeftModel.merge_and_unload().save_pretrained(DIR).",
        )
    index = directory / "model.safetensors.index.json"
    parts = _json(index).get("weight_map") if index.exists() else {}
    if not isinstance(parts, Mapping):
        raise ModelError(f"{index} is damaged: it has no weight_map.", "Fetch it again.")
    listed = {str(part) for part in parts.values()}
    outside = next((part for part in sorted(listed) if Path(part).name != part), None)
    if outside is not None:
        raise ModelError(
            f"{index} names {outside!r}, which is not in its directory, and is not read.", "Fetch the checkpoint again."
        )
    wrong = sorted(part for part in listed if not part.endswith(".safetensors"))
    if not wrong and not any(directory.glob("*.safetensors")):
        wrong = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if wrong:
        raise ModelError(
            f"{directory} holds its weights in {wrong[0]!r}. Only safetensors are read: reading a pickle can run code.",
            "Convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW), and copy "
            "the tokenizer.",
        )


def is_own_export(directory: Path) -> bool:
    """Tell whether all code in a checkpoint is, byte for byte, that of an export of this or a former version."""
    settings = _json(directory / "config.json")
    family = next((f for f in FAMILIES.values() if export_type(f) == settings.get("model_type")), None)
    if family is None or settings.get("auto_map") not in [auto_map(family, form) for form in get_args(Brought)]:
        return False
    if "auto_map" in _json(directory / "tokenizer_config.json"):
        return False
    texts = (*(modeling_text(family, form) for form in get_args(Brought)), block_configs_text())
    known = *(hashlib.sha256(text.encode("utf8")).hexdigest() for text in texts), *_FORMER
    code = [path for path in directory.rglob("*.py") if path.parent.name != "__pycache__"]
    # Exports of single shots may lie below, and each has the file; transformers looks for code in other places too.
    places = {directory, *(path for path in directory.glob("shot-*") if path.is_dir())}
    expected = {
        path for place in places for path in (place / MODELING_FILE, place / _NEMOTRON_NAS / BLOCK_CONFIGS_FILE)
    }
    in_place = all(path in expected for path in code)
    return in_place and directory / MODELING_FILE in code and all(_digest(path) in known for path in code)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path) -> Mapping[str, Any]:
    """Entries of a file of JSON; none if the file does not exist or cannot be read."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
