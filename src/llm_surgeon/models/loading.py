"""Loading of models, tokenizers and configurations from a directory, a hub id or the word ``demo``."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.data.demo import demo_model
from llm_surgeon.errors import ConfigError
from llm_surgeon.models import settings
from llm_surgeon.models.norms import cast_layer_norms
from llm_surgeon.models.settings import DTYPES, dtype_of, not_loaded, read_settings
from llm_surgeon.models.splitting import warn_of_splitting
from llm_surgeon.models.trust import check_format, check_name, is_own_export
from llm_surgeon.models.weights import check_weights, read_model

# Weights that a hub repository may hold besides its safetensors.
_OTHER_FORMATS = ["*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*.pt", "*.pth", "*/*", "consolidated*"]


def resolve_source(model: str) -> str:
    """Resolve the name of a model: ``demo`` to its directory, fetched if need be, ``~`` in paths; hub ids stay.

    Raises:
        ModelError: If there is no such directory, and the name cannot be a hub id.
    """
    if model == "demo":
        return str(demo_model())
    source = os.path.expanduser(model)
    check_name(source)
    return source


def resolve_device(device: str) -> torch.device:
    """Device of a name; ``auto`` is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: If the device does not exist here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"The device {device!r} cannot be used: {str(error).splitlines()[0]}.", "Use --device cpu or --device auto."
        ) from None
    return torch.device(device)


def check_dtype(dtype: str) -> None:
    """Make sure that the name of a type is one of ``DTYPES``.

    Raises:
        ConfigError: If the name is not known.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"The type {dtype!r} is not known.", f"Use one of {', '.join(DTYPES)}.")


def model_type_of(source: str) -> str:
    """Read the ``model_type`` of a local directory or a hub id, without running code of the checkpoint.

    Raises:
        ModelError: If there is no configuration.
    """
    return str(read_settings(source).get("model_type"))


def positions_of(source: str) -> int | None:
    """Read the number of positions of a model, without running code of the checkpoint; None if it is not stated.

    Raises:
        ModelError: If there is no configuration.
    """
    entries = read_settings(source)
    positions = (entries.get("text_config") or entries).get("max_position_embeddings")
    return positions if isinstance(positions, int) else None


def local_directory(model: str) -> Path:
    """Directory of a model: its own, or one in the cache, to which a hub id or ``demo`` is fetched if need be.

    Raises:
        ModelError: If the model cannot be fetched.
    """
    path = Path(resolve_source(model))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(path), ignore_patterns=_OTHER_FORMATS))
    except Exception as error:
        raise not_loaded(model, "model", error) from None


def source_files(source: str, config: Any) -> dict[str, str]:
    """Fingerprint of a model's files, which changes when they are written anew.

    Args:
        source: A local directory or a hub id.
        config: Configuration of the model, from ``load_config``.

    Returns:
        Size and time of each file by name; for a hub id its revision.
    """
    directory = Path(source)
    if not directory.is_dir():
        return {"revision": f"{source} {getattr(config, '_commit_hash', None)}"}
    weights = (path for ending in ("safetensors", "bin") for path in directory.glob(f"*.{ending}"))
    return {path.name: _stamp(path) for path in sorted([*weights, directory / "config.json"])}


def _stamp(path: Path) -> str:
    status = path.stat()
    seconds, rest = divmod(status.st_mtime_ns, 10**9)
    return f"{status.st_size:,} bytes of {datetime.datetime.fromtimestamp(seconds, datetime.UTC):%F %T}.{rest:09d}"


def load_config(source: str, trust_remote_code: bool = False) -> Any:
    """Load the configuration of a local directory or a hub id.

    Args:
        source: A local directory or a hub id.
        trust_remote_code: Whether code of the checkpoint may run.

    Raises:
        ModelError: If there is no configuration, or it needs code that may not run.
    """
    return settings.load_config(source, _runs_code(source, trust_remote_code))


def load_tokenizer(source: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local directory or a hub id.

    Args:
        source: A local directory or a hub id.
        trust_remote_code: Whether code of the checkpoint may run, if it is not an export of this package.

    Raises:
        ModelError: If there is no tokenizer, or it needs code that may not run.
    """
    # Given here, as transformers would read the configuration by itself, and stop at entries that do not matter here.
    trusted = _runs_code(source, trust_remote_code)
    config = settings.load_config(source, trusted)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, config=config, trust_remote_code=trusted
        )
    except Exception as error:
        raise not_loaded(source, "tokenizer", error) from None
    warn_of_splitting(tokenizer, Path(source) / "tokenizer.json")
    return tokenizer


def load_model(
    source: str, dtype: str = "auto", device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model, in evaluation mode.

    Args:
        source: A local directory or a hub id.
        dtype: A name of ``DTYPES``.
        device: Device to put the model on.
        trust_remote_code: Whether code of the checkpoint may run, if it is not an export of this package.

    Raises:
        ModelError: If the model cannot be loaded, needs code that may not run, holds its weights in another format than
            safetensors, or has other weights than its configuration describes.
    """
    return load_checked(source, check_checkpoint(source, trust_remote_code), dtype, device)


def load_checked(source: str, runs_code: bool, dtype: str, device: str | torch.device) -> PreTrainedModel:
    """Load a causal language model from a checkpoint that has been checked, in evaluation mode.

    Args:
        source: A local directory or a hub id.
        runs_code: Whether code of the checkpoint runs: the result of ``check_checkpoint``.
        dtype: A name of ``DTYPES``.
        device: Device to put the model on.

    Raises:
        ModelError: If the model cannot be loaded.
    """
    model = read_model(source, settings.load_config(source, runs_code), dtype_of(source, dtype), runs_code)
    cast_layer_norms(model)
    model.to(torch.device(device))  # type: ignore[arg-type]  # the decorator hides nn.Module's signature
    model.eval()
    return model


def check_checkpoint(source: str, trust_remote_code: bool = False) -> bool:
    """Make sure that a model can be loaded, without reading its weights.

    Args:
        source: A local directory or a hub id.
        trust_remote_code: Whether code of the checkpoint may run, if it is not an export of this package.

    Returns:
        Whether code of the checkpoint is run.

    Raises:
        ModelError: See ``load_model``.
    """
    check_format(Path(source))
    runs_code = _runs_code(source, trust_remote_code)
    check_weights(source, settings.load_config(source, runs_code), runs_code)
    return runs_code


def load(
    path: str | Path, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an export of this package, or any causal language model, with its tokenizer.

    Args:
        path: A directory, a hub id, or ``demo``.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: Whether code of the checkpoint may run. The modelling file of a local export is run in any
            case if it is byte for byte what this version writes.

    Returns:
        The model in evaluation mode, and its tokenizer.

    Raises:
        ModelError: If there is no model to load, or it needs code that may not run.
        ConfigError: If the device does not exist or the type is not known.
    """
    check_dtype(dtype)
    source, where = resolve_source(str(path)), resolve_device(device)
    return load_model(source, dtype, where, trust_remote_code), load_tokenizer(source, trust_remote_code)


def _runs_code(source: str, trust_remote_code: bool) -> bool:
    return trust_remote_code or is_own_export(Path(source))
