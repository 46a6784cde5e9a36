"""Weights of a checkpoint: a check against its configuration before any are read, and the reading itself."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from llm_surgeon.errors import ModelError
from llm_surgeon.models.classes import auto_model
from llm_surgeon.models.settings import not_loaded, quantisation_of

# Buffers that older versions of transformers stored, and that every model makes itself now.
_FORMER_BUFFERS = re.compile(r"(\.attn\.bias|masked_bias|rotary_emb\.inv_freq|position_ids)$")
_PARAMETERS = (".weight", ".bias")
_NAMED = 3


def check_weights(source: str, config: Any, runs_code: bool) -> None:
    """Make sure that a checkpoint has all tensors of its model, in the right shapes, and no others.

    A model without memory is built and compared with the headers of the files. Names that transformers changes when it
    loads are changed for the comparison too.

    Args:
        source: A local directory, or a hub id, whose weights are fetched if need be.
        config: Configuration of the model.
        runs_code: Whether code of the checkpoint may run.

    Raises:
        ModelError: If tensors are missing, have another shape, or are not part of the model; names them.
    """
    # Only a quantiser itself knows what names and types it makes.
    if quantisation_of(config) is None:
        _check_headers(source, config)
        read_model(source, config, torch.float32, runs_code, torch.device("meta"))


def read_model(
    source: str, config: Any, dtype: torch.dtype, runs_code: bool, device: torch.device | None = None
) -> PreTrainedModel:
    """Read a causal language model with its weights, all of which have to come from the checkpoint.

    Args:
        source: A local directory or a hub id.
        config: Configuration of the model.
        dtype: Type of the weights.
        runs_code: Whether code of the checkpoint may run.
        device: ``meta`` for a model that has shapes and no memory; None reads the weights into main memory.

    Raises:
        ModelError: If the model cannot be loaded, or has weights that the checkpoint lacks.
    """
    where = {} if device is None else {"device_map": str(device)}
    try:
        with quietly():
            loaded: Any = auto_model(config.model_type).from_pretrained(
                source,
                config=config,
                dtype=dtype,
                trust_remote_code=runs_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **where,
            )
    # Files may be damaged in any way, and errors are of as many kinds.
    except Exception as error:
        raise not_loaded(source, "model", error) from None
    model: PreTrainedModel
    model, found = loaded
    _check(source, found)
    return model


def _check_headers(source: str, config: Any) -> None:
    """Make sure that the weights in the files are real numbers, and at least as many tensors as there are blocks.

    Raises:
        ModelError: If they are not, or a file cannot be read.
    """
    paths = sorted(Path(source).glob("*.safetensors"))
    try:
        types = {name: dtype for path in paths for name, dtype in _types(path)}
    except (OSError, SafetensorError) as error:
        raise not_loaded(source, "model", error) from None
    blocks = getattr(config.get_text_config(), "num_hidden_layers", None)
    # Checked first, as building a model of thousands of blocks takes minutes.
    if types and isinstance(blocks, int) and blocks > len(types):
        raise ModelError(
            f"The configuration of {source!r} describes {blocks:,} blocks, and its weight files hold {len(types):,} "
            "tensors.",
            "Give the config.json that belongs to the weights.",
        )
    whole = sorted(name for name, dtype in types.items() if name.endswith(_PARAMETERS) and dtype[:1] not in ("F", "B"))
    whole += sorted(name for name, dtype in types.items() if name.endswith(_PARAMETERS) and dtype == "BOOL")
    if whole:
        raise ModelError(
            f"The weights of {source!r} are not all real numbers: {_listed([f'{n} is {types[n]}' for n in whole])}.",
            "Give the original checkpoint; these look quantised, and the configuration does not say how.",
        )


def _types(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the names of the tensors in a file with their types, as in its header: F32, BF16, I8."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dictionary
            yield name, str(file.get_slice(name).get_dtype())


def _check(source: str, found: Mapping[str, Any]) -> None:
    missing = sorted(found["missing_keys"])
    untaken = sorted(key for key in found["unexpected_keys"] if not _FORMER_BUFFERS.search(key))
    shapes = [f"{key} {[*stored]} instead of {[*wanted]}" for key, stored, wanted in sorted(found["mismatched_keys"])]
    findings = [
        f"{words} {_listed(names)}"
        for words, names in (
            ("it lacks", missing),
            ("it has the wrong shape of", shapes),
            ("nothing takes its", untaken),
            ("it cannot be read:", found.get("error_msgs") or []),
        )
        if names
    ]
    if findings:
        raise ModelError(
            f"The weights of {source!r} are not those of the model that its configuration describes: "
            f"{'; '.join(findings)}.",
            "Give all files of a causal language model, as save_pretrained writes them, and the config.json that "
            "belongs to them.",
        )


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return f"{', '.join(list(names)[:_NAMED])}{more}"


@contextmanager
def quietly() -> Iterator[None]:
    """Turn off the bars of transformers, and its table of missing tensors, which the error names instead."""
    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
