"""Conversion of a finished export, or of another checkpoint, into further formats."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from llm_surgeon.errors import ConfigError, OutputError
from llm_surgeon.export.format import Exported, Format
from llm_surgeon.export.formats import FORMATS
from llm_surgeon.models import pruned_family_of
from llm_surgeon.models.loading import (
    check_dtype,
    load_config,
    load_model,
    load_tokenizer,
    local_directory,
    model_type_of,
    resolve_device,
    resolve_source,
)
from llm_surgeon.recipe.groups.base import check_names
from llm_surgeon.records import FormatRecord
from llm_surgeon.run.export import write_format
from llm_surgeon.session.given import as_path
from llm_surgeon.system.files import PARTIAL, check_disk_space, flush

logger = logging.getLogger(__name__)


def export_as(
    model: str | Path,
    formats: Sequence[str] | str,
    out: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[FormatRecord, ...]:
    """Write an export, or another checkpoint of a supported architecture, in further formats.

    Each format has a directory of its own, of its name, which is there only when the files are complete and checked.

    Args:
        model: An export, a local directory, a hub id, or ``demo``.
        formats: Names of formats other than ``hf``.
        out: Directory for the directories of the formats; None takes that of the export.
        dtype: Type of the weights in memory: auto (as stored), float32, bfloat16 or float16.
        device: Device that computes the logits to compare with.
        trust_remote_code: Whether code of the checkpoint may run, if it is not an export of this package.

    Returns:
        One record of each format.

    Raises:
        ConfigError: If a format is not known, or cannot say the model.
        UnsupportedModelError: If a format cannot say the tokenizer.
        OutputError: If a directory is there already, or cannot be written.
        ExportMismatchError: If the engine of a format computes something else than the model.
        ModelError: If the model cannot be loaded.
    """
    model = str(model)
    chosen = _formats(formats)
    check_dtype(dtype)
    torch_device = resolve_device(device)
    source = resolve_source(model)
    directory = _place(model, out)
    for form in chosen:
        _check_new(directory / form.name)
    family = pruned_family_of(model_type_of(source))
    settings, tokenizer = load_config(source, trust_remote_code), load_tokenizer(source, trust_remote_code)
    for form in chosen:
        form.check_tokenizer(tokenizer, settings)
    logger.info("loading %s", model)
    network = load_model(source, dtype, torch_device, trust_remote_code)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    check_disk_space(directory / chosen[0].name, sum(form.nbytes(parameters, network.dtype) for form in chosen))
    exported = Exported(network, tokenizer, family, None, None, local_directory(source))
    for form in chosen:
        form.check_result(exported)
    return tuple(_written(exported, form, directory) for form in chosen)


def _formats(names: Sequence[str] | str) -> list[Format]:
    """Formats by their names.

    Raises:
        ConfigError: If a name is not known, or that of the format in which models are read.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    others = [name for name, form in FORMATS.items() if form.own_directory]
    try:
        check_names(names, FORMATS)
    except ValueError as error:
        raise ConfigError(f"formats {error}.", f"Give {', '.join(others)}, or several of them.") from None
    within = next((name for name in names if name not in others), None)
    if within is not None or not names:
        raise ConfigError(
            f"The model is in the format {within} already." if names else "No format is given.",
            f"Give {', '.join(others)}, or several of them.",
        )
    return [FORMATS[name] for name in names]


def _place(model: str, out: str | Path | None) -> Path:
    """Directory for the directories of the formats.

    Raises:
        ConfigError: If none is given, and the model is no local directory.
    """
    if out is not None:
        return as_path(out)
    if not Path(model).is_dir():
        raise ConfigError(
            f"There is no directory {model!r} that could take the files.",
            "Correct the path; for a hub id or demo, give a directory with --out.",
        )
    return Path(model)


def _check_new(directory: Path) -> None:
    """Make sure that the directory of a format is not there yet.

    Raises:
        OutputError: If it is.
    """
    if directory.exists():
        raise OutputError(f"{directory} is there already.", "Remove it first, or give another --out.")


def _written(exported: Exported, form: Format, directory: Path) -> FormatRecord:
    """Write a model in one format, check it, and put the files in their place."""
    logger.info("writing the format %s", form.name)
    directory.mkdir(parents=True, exist_ok=True)
    beside = directory / f"{form.name}{PARTIAL}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        record = write_format(exported, form, beside)
        flush(beside)
        beside.rename(directory / form.name)
        logger.info("%s is complete", directory / form.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return record
