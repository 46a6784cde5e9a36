"""The configuration of a checkpoint, read without running code and without entries on how to run the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llm_surgeon.errors import ModelError

logger = logging.getLogger(__name__)

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Kinds of attention that every transformers model can be built with. Others need packages, or native code of a hub
# repository that would be fetched and run while the model is built.
_ATTENTIONS = ("eager", "sdpa")
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# Entries that say how to run a model, not what it computes; each can make a model that cannot be built or called.
_HOW_TO_RUN = (
    *("experts_implementation", "_experts_implementation", "_experts_implementation_internal"),
    *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states"),
)
# Files of which a tokenizer needs one.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# More blocks than any model has. Without a limit, lists of any length would be made before the weights are compared.
_MOST_BLOCKS = 10_000


def read_settings(source: str) -> dict[str, Any]:
    """Read the entries of config.json, unchanged.

    Args:
        source: A local directory or a hub id.

    Raises:
        ModelError: If there is no configuration, or the file cannot be read.
    """
    path = Path(source) / "config.json"
    try:
        settings: Any
        if path.is_file():
            # Some editors begin a file with a byte order mark.
            settings = json.loads(path.read_text(encoding="utf-8-sig"))
        else:
            settings, _ = PreTrainedConfig.get_config_dict(source)
    # Files may be damaged in any way, and errors are of as many kinds.
    except Exception as error:
        raise not_loaded(source, "configuration", error) from None
    if not isinstance(settings, dict) or not settings:
        raise not_loaded(source, "configuration", OSError("there is no config.json, or it has no entries"))
    return settings


def load_config(source: str, runs_code: bool = False) -> Any:
    """Load the configuration of a local directory or a hub id, for building its model.

    Entries on attention that needs more than torch are left out, and so are entries on how to call the model. This
    package decides on both.

    Args:
        source: A local directory or a hub id.
        runs_code: Whether code of the checkpoint may run.

    Raises:
        ModelError: If there is no configuration, it cannot be built, or it needs code that may not run.
    """
    settings = read_settings(source)
    _check_depth(source, settings)
    dtype = _declared(settings)
    kind = settings.get("model_type")
    try:
        if (runs_code and "auto_map" in settings) or not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            config = AutoConfig.from_pretrained(source, trust_remote_code=runs_code)
            _set_attention_aside(config)
        else:
            config = CONFIG_MAPPING[kind].from_dict(_without_how_to_run(settings))
            config._name_or_path = source
            # The hub's revision shows later whether the model is still the same.
            config._commit_hash = settings.get("_commit_hash")
    except Exception as error:
        raise not_loaded(source, "configuration", error) from None
    config.dtype = dtype if dtype in DTYPES.values() else None
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions < 1:
        raise not_loaded(source, "configuration", ValueError(f"max_position_embeddings is {positions}"))
    return config


def quantisation_of(settings: Any) -> Any:
    """How weights are quantised, as a configuration says for the model or for the language model in it; None: not.

    Args:
        settings: Entries of config.json, or a configuration of transformers.
    """
    entries = settings if isinstance(settings, Mapping) else vars(settings)
    own = entries.get("quantization_config")
    inner = entries.get("text_config")
    return own if own is not None or inner is None else quantisation_of(inner)


def dtype_of(source: str, asked: str, settings: Mapping[str, Any] | None = None) -> torch.dtype:
    """Type in which a model is loaded: the one asked for, or else the stored one; float64 becomes float32.

    Args:
        source: A local directory or a hub id.
        asked: A name of ``DTYPES``.
        settings: Entries of config.json, if they have been read already.

    Raises:
        ModelError: If the stored type cannot be computed with.
    """
    if asked != "auto":
        found: torch.dtype = DTYPES[asked]
        return found
    stored = stored_dtype(source, settings)
    if stored == torch.float64:
        logger.info("the weights are stored as float64, and loaded as float32")
        return torch.float32
    if stored not in DTYPES.values():
        raise ModelError(
            f"The weights of {source!r} are stored as {str(stored).removeprefix('torch.')}, which cannot be computed "
            "with.",
            "Give the type to load them as: --dtype float32, bfloat16 or float16.",
        )
    return stored


def stored_dtype(source: str, settings: Mapping[str, Any] | None = None) -> torch.dtype:
    """Type of the weights in the files: as config.json declares, or else that of the first tensor.

    Args:
        source: A local directory or a hub id.
        settings: Entries of config.json, if they have been read already.

    Raises:
        ModelError: If there is no configuration.
    """
    declared = _declared(read_settings(source) if settings is None else settings)
    return declared or _first_dtype(Path(source)) or torch.float32


def not_loaded(source: str, what: str, error: BaseException) -> ModelError:
    """Error for a part of a checkpoint that cannot be loaded; names the reason.

    Args:
        source: A local directory or a hub id.
        what: The part, in a word.
        error: The reason.
    """
    if "trust_remote_code" in str(error):
        return ModelError(
            f"The {what} of {source!r} needs code that the checkpoint brings, which is not run unasked.",
            "Read that code, and run the command with --trust-remote-code if you trust it (in Python: "
            "trust_remote_code=True).",
        )
    logger.debug("the %s of %s cannot be loaded", what, source, exc_info=error)
    # Some errors name the cause in a second line, others go on for a page.
    reason = " ".join(" ".join(str(error).splitlines()[:2]).split())[:300].rstrip(".")
    absent = isinstance(error, OSError)
    if not absent and not isinstance(error, ValueError):
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
    local = Path(source).is_dir()
    there = (path for pattern in _TOKENIZER_FILES for path in Path(source).glob(pattern))
    if local and what == "tokenizer" and next(there, None) is None:
        return ModelError(
            f"{source} has no tokenizer: neither tokenizer.json, nor a vocabulary or a model of one.",
            "Copy the tokenizer's files of the checkpoint into it.",
        )
    nowhere = "" if local else " (there is no such directory, so that it is taken for a hub id)"
    return ModelError(
        f"The {what} of {source!r} cannot be loaded{nowhere}: {reason}.",
        "Give a directory that holds a Hugging Face checkpoint, a hub id that can be reached, or the word demo."
        if absent
        else "Mend what its files say, or fetch the checkpoint again.",
    )


def _check_depth(source: str, settings: Mapping[str, Any]) -> None:
    text = settings.get("text_config")
    for values in (settings, text if isinstance(text, Mapping) else {}):
        for key in _DEPTH_KEYS:
            depth = values.get(key)
            if isinstance(depth, int) and depth > _MOST_BLOCKS:
                raise ModelError(
                    f"The configuration of {source!r} says that {key} is {depth:.3g}.",
                    f"Correct config.json: no model has more than {_MOST_BLOCKS:,} blocks.",
                )


def _declared(settings: Mapping[str, Any]) -> torch.dtype | None:
    """Type that config.json names; None if it names none."""
    for key in _DTYPE_KEYS:
        name = str(settings.get(key) or "").removeprefix("torch.")
        if isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
    return None


def _first_dtype(directory: Path) -> torch.dtype | None:
    """Type of the first tensor of floating point in the weight files of a directory; None if there is none."""
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a dictionary
                tensor = file.get_slice(name)[:0] if file.get_slice(name).get_shape() else file.get_tensor(name)
                if tensor.is_floating_point():
                    dtype: torch.dtype = tensor.dtype
                    return dtype
    return None


def _without_how_to_run(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a configuration, nested ones included, without those that this package decides on."""
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _HOW_TO_RUN or key in _DTYPE_KEYS:
            continue
        if key in _ATTENTION_KEYS and value not in _ATTENTIONS:
            if isinstance(value, str):
                logger.info(
                    "the configuration asks for the attention %.80r; the model is built with torch's own", value
                )
            continue
        kept[key] = _without_how_to_run(value) if isinstance(value, dict) and key.endswith("_config") else value
    return kept


def _set_attention_aside(config: Any) -> None:
    """Undo the entries that this package decides on, in a configuration that code of the checkpoint has built."""
    if getattr(config, "_attn_implementation", None) not in (None, *_ATTENTIONS):
        config._attn_implementation = None
    config.return_dict = True
