"""A checkpoint that its makers publish in eight or four bits, written in 16 bits, so that it can be pruned."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llm_surgeon.errors import ConfigError, ModelError
from llm_surgeon.export.companions import copy_companions
from llm_surgeon.mathematics.block_formats import fp8_numbers, mxfp4_numbers
from llm_surgeon.models.loading import check_checkpoint, check_dtype, local_directory
from llm_surgeon.models.settings import DTYPES, not_loaded, quantisation_of, read_settings
from llm_surgeon.models.skeleton import DEQUANTISED
from llm_surgeon.models.trust import check_format
from llm_surgeon.session.given import as_path
from llm_surgeon.system.files import (
    PARTIAL,
    check_disk_space,
    check_output,
    flush,
    readable_as_others,
    writing,
)

logger = logging.getLogger(__name__)

# Bytes of a file after which the next one begins.
_FILE = 2**31
# Dimensions of a tensor of all experts.
_OF_EXPERTS = 3
_FP8_SCALE, _MX_BLOCKS, _MX_SCALES = "_scale_inv", "_blocks", "_scales"
# Scales of activations, for which plain layers have no use.
_OF_ACTIVATIONS = ("activation_scale", "input_scale")
_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"


def dequantize(model: str | Path, out: str | Path, *, dtype: str = "bfloat16", trust_remote_code: bool = False) -> Path:
    """Write a checkpoint with weights in FP8 or MXFP4 as one with the numbers that they mean.

    Other tensors keep their bits. One tensor is read at a time, and a file of two gibibytes, or of one larger tensor,
    waits in memory to be written. The result has the tensors, with the shapes, of the class that its configuration
    names; that is checked.

    Args:
        model: A local directory or a hub id.
        out: The directory to make; must not exist, or be empty.
        dtype: Type of the numbers: bfloat16, float16 or float32. In bfloat16 those of MXFP4 are exact.
        trust_remote_code: Whether code of the checkpoint may run.

    Returns:
        The directory.

    Raises:
        ConfigError: If the type is none of these.
        ModelError: If the checkpoint is not quantised, or by another method, or its tensors are not those of the
            method or of its class.
        OutputError: If ``out`` cannot be used.
        DiskSpaceError: If the result does not fit on the disk.
    """
    out = as_path(out)
    check_dtype(dtype)
    if dtype == "auto":
        raise ConfigError("What is stored in less than 16 bits has no type of its own.", "Give --dtype bfloat16.")
    check_output(out)
    source = local_directory(str(model))
    check_format(source)
    settings = read_settings(str(source))
    how = _method(str(model), settings)
    with ExitStack() as files:
        tensors = _Stored(str(model), source, files, how, DTYPES[dtype])
        check_disk_space(out, tensors.nbytes)
        out.parent.mkdir(parents=True, exist_ok=True)
        place = files.enter_context(TemporaryDirectory(prefix=f".{out.name}-", suffix=PARTIAL, dir=out.parent))
        beside = Path(place) / out.name
        with writing(out, tensors.nbytes):
            beside.mkdir()
            _write(tensors, beside)
            copy_companions(source, beside)
            _write_settings(settings, dtype, beside / _CONFIG)
            for path in source.glob("*.py"):
                shutil.copyfile(path, beside / path.name)
            readable_as_others(beside)
            flush(beside)
        try:
            check_checkpoint(str(beside), trust_remote_code)
        except ModelError as error:
            raise ModelError(error.cause.replace(str(beside), str(model)), error.remedy) from None
        os.replace(beside, out)  # replaces an empty directory too
    return out


def _method(model: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the weights are quantised, as config.json says.

    Raises:
        ModelError: If they are not, or by a method that is not read.
    """
    how = quantisation_of(settings)
    if not isinstance(how, Mapping):
        raise ModelError(f"The weights of {model!r} are not quantised.", "Prune it as it is.")
    method = how.get("quant_method")
    if method not in DEQUANTISED:
        raise ModelError(
            f"The weights of {model!r} are quantised by {method!r}; {' and '.join(DEQUANTISED)} are read.",
            "Give the original checkpoint.",
        )
    return how


class _Stored:
    """Tensors of a quantised checkpoint, as the numbers that they mean.

    Args:
        model: Name of the checkpoint, for errors.
        source: Its directory.
        files: Closes the files in the end.
        how: Entry of config.json on the quantisation.
        dtype: Type of the numbers.
    """

    def __init__(self, model: str, source: Path, files: ExitStack, how: Mapping[str, Any], dtype: torch.dtype) -> None:
        self._model, self._dtype = model, dtype
        block = how.get("weight_block_size")
        self._block = (int(block[0]), int(block[1])) if block else None
        self._files: dict[str, Any] = {}
        try:
            for path in sorted(source.glob("*.safetensors")):
                file = files.enter_context(safe_open(path, framework="pt"))
                self._files |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            raise not_loaded(model, "model", error) from None
        if not self._files:
            raise ModelError(f"There are no weights in {source}.", "Give all files of the checkpoint.")

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, at most."""
        total = 0
        for name in self._files:
            shape, kind = self._header(name)
            packed = 2 if name.endswith(_MX_BLOCKS) else 1
            itemsize = 4 if kind in ("F32", "I32") else 8 if kind in ("F64", "I64") else 2
            total += math.prod(shape) * packed * max(itemsize, self._dtype.itemsize)
        return total

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the names of the dense tensors, with their numbers.

        Raises:
            ModelError: If a tensor is not what the method says.
        """
        for name in self._files:
            if self._is_scale(name):
                continue
            try:
                yield self._numbers(name)
            except (KeyError, ValueError) as error:
                raise ModelError(
                    f"{name} of {self._model!r} is not what its configuration says: {str(error).strip(chr(39))}.",
                    "Give all files of the checkpoint, and the config.json that belongs to them.",
                ) from None

    def _is_scale(self, name: str) -> bool:
        of_blocks = f"{name.removesuffix(_MX_SCALES)}{_MX_BLOCKS}"
        return (
            name.endswith(_OF_ACTIVATIONS)
            or (name.endswith(_FP8_SCALE) and name.removesuffix(_FP8_SCALE) in self._files)
            or (name.endswith(_MX_SCALES) and of_blocks in self._files)
        )

    def _numbers(self, name: str) -> tuple[str, Tensor]:
        if name.endswith(_MX_BLOCKS):
            dense = name.removesuffix(_MX_BLOCKS)
            stored, scales = self._tensor(name), self._tensor(f"{dense}{_MX_SCALES}")
            # Stored for products with rows; the class has inputs first.
            return dense, self._by_expert(lambda one, of_one: mxfp4_numbers(one, of_one).T, stored, scales)
        tensor = self._tensor(name)
        if tensor.dtype.itemsize == 1:
            scales = self._tensor(f"{name}{_FP8_SCALE}")
            if not tensor.dtype.is_floating_point:
                raise ValueError(f"it has the type {tensor.dtype}")
            if tensor.dim() == _OF_EXPERTS == scales.dim():
                return name, self._by_expert(lambda one, of_one: fp8_numbers(one, of_one, self._block), tensor, scales)
            return name, fp8_numbers(tensor, scales, self._block).to(self._dtype)
        return name, tensor

    def _by_expert(self, numbers: Callable[[Tensor, Tensor], Tensor], stored: Tensor, scales: Tensor) -> Tensor:
        """Numbers of the matrices of all experts; one at a time, as those of all in float32 may not fit in memory."""
        if len(stored) != len(scales):
            raise ValueError(f"{len(scales)} scales do not go with {len(stored)} experts")
        found: Tensor | None = None
        for number, (one, of_one) in enumerate(zip(stored, scales, strict=True)):
            matrix = numbers(one, of_one)
            if found is None:
                found = matrix.new_empty(len(stored), *matrix.shape, dtype=self._dtype)
            found[number] = matrix
        if found is None:
            raise ValueError("it has no experts")
        return found

    def _tensor(self, name: str) -> Tensor:
        if name not in self._files:
            raise KeyError(f"there is no {name}")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def _header(self, name: str) -> tuple[list[int], str]:
        header = self._files[name].get_slice(name)
        return header.get_shape(), str(header.get_dtype())


def _write(tensors: _Stored, directory: Path) -> None:
    """Write tensors into files of limited size, and their index."""
    parts: list[dict[str, int]] = []
    waiting: dict[str, Tensor] = {}

    def put() -> None:
        if waiting:
            save_file(waiting, directory / f"{len(parts)}{PARTIAL}", metadata={"format": "pt"})
            parts.append({name: tensor.nbytes for name, tensor in waiting.items()})
            logger.info("%d tensors, %.1f GB", len(waiting), sum(parts[-1].values()) / 1e9)
            waiting.clear()

    for name, tensor in tensors:
        if sum(other.nbytes for other in waiting.values()) + tensor.nbytes > _FILE:
            put()
        waiting[name] = tensor
    put()
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for number, name in enumerate(names):
        (directory / f"{number}{PARTIAL}").rename(directory / name)
    places = {tensor: name for part, name in zip(parts, names, strict=True) for tensor in part}
    total = sum(size for part in parts for size in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf8")


def _write_settings(settings: Mapping[str, Any], dtype: str, path: Path) -> None:
    """Write config.json without the quantisation, and with the type."""
    plain = {name: value for name, value in settings.items() if name not in ("quantization_config", "torch_dtype")}
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = {k: v for k, v in plain["text_config"].items() if k != "quantization_config"}
    path.write_text(json.dumps(plain | {"dtype": dtype}, indent=2) + "\n", encoding="utf8")
