"""Checkpoints on disk: the state of a run after a shot, from which a later process continues.

A checkpoint has three files: ``shot-N.safetensors`` (weights of the prunable layers, masks, and the factors from which
a power iteration starts), ``shot-N.json`` (the run, and its report so far) and, written last, ``shot-N.sha256`` with
the checksums of the other two, in the form of ``sha256sum``. Files without a matching checksum are no checkpoint.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.curvature import WarmStart
from llm_surgeon.errors import OutputError
from llm_surgeon.mathematics.keep_masks import AXES, KeepMask
from llm_surgeon.mathematics.linalg import is_finite
from llm_surgeon.mathematics.unstructured_selection import ElementMask
from llm_surgeon.models.anatomy import Anatomy, LinearLayer
from llm_surgeon.models.matrix import core_of, narrow_heads, write_matrix
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.pruning.result import RunState
from llm_surgeon.pruning.structures import Masks
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import PruneReport, Record, RunRecord
from llm_surgeon.refit.stages import changed_beside
from llm_surgeon.system.files import in_place, writing
from llm_surgeon.system.tensor_file import TensorFile, write_tensors

logger = logging.getLogger(__name__)

# Number of checkpoints that are kept: if the newest is damaged, there is one more.
KEPT = 2


class Checkpoint(Record):
    """The JSON file of a checkpoint: the run, and its report so far."""

    run: RunRecord
    report: PruneReport

    @property
    def shot(self) -> int:
        """Number of the shot after which the checkpoint was written."""
        return len(self.report.shots)


class Checkpoints:
    """The checkpoints in a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def write(self, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
        """Write a checkpoint, and remove all but the last two.

        Raises:
            DiskSpaceError: If it does not fit on the disk; its files are removed then.
        """
        shot, directory = checkpoint.shot, self._directory
        self._sums(shot).unlink(missing_ok=True)
        try:
            with writing(directory / f"shot-{shot}.safetensors", sum(tensor.nbytes for tensor in tensors.values())):
                with in_place(self._tensors(shot)) as path:
                    write_tensors(path, tensors)
                self._write_words(checkpoint)
                self._write_sums(shot, [self._line(self._tensors(shot)), self._line(self._words(shot))])
        except BaseException:
            # An interrupt may come when the checksums are there already, and with them a complete checkpoint.
            if not self._sums(shot).exists():
                self._remove(shot)
            raise
        for old in self.shots()[KEPT:]:
            self._remove(old)

    def amend(self, checkpoint: Checkpoint) -> None:
        """Write the JSON file of a complete checkpoint anew, and leave its tensors.

        The checkpoint is complete at each moment, also if the process ends here.

        Raises:
            DiskSpaceError: If the file does not fit on the disk; the checkpoint is as before then.
        """
        shot = checkpoint.shot
        new = _text(checkpoint)
        with writing(self._words(shot), len(new)):
            lines = self._sums(shot).read_text(encoding="utf8").splitlines(keepends=True)
            of_words = f"  {self._words(shot).name}\n"
            expected = f"{hashlib.sha256(new).hexdigest()}{of_words}"
            # For a moment there are checksums of the old and of the new file, so that either one matches.
            self._write_sums(shot, [*lines, expected])
            self._write_words(checkpoint)
            self._write_sums(shot, [*(line for line in lines if not line.endswith(of_words)), expected])

    def _write_words(self, checkpoint: Checkpoint) -> None:
        with in_place(self._words(checkpoint.shot)) as path:
            path.write_bytes(_text(checkpoint))

    def _write_sums(self, shot: int, lines: Sequence[str]) -> None:
        with in_place(self._sums(shot)) as path:
            path.write_text("".join(lines), encoding="utf8")

    def _line(self, path: Path) -> str:
        return f"{_digest(path)}  {path.name}\n"

    def shots(self) -> list[int]:
        """Numbers of the shots with a complete checkpoint, newest first; the files may be damaged."""
        return sorted(self._numbers("sha256"), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint whose JSON file is intact; removes damaged checkpoints, with a warning.

        Raises:
            OutputError: If another version of this package wrote it, with other fields.
        """
        for shot in self.shots():
            if self._intact(shot, self._words(shot)):
                return self._read(shot)
            self._remove(shot)
        return None

    def _read(self, shot: int) -> Checkpoint:
        try:
            return Checkpoint.model_validate_json(self._words(shot).read_bytes())
        except ValueError as error:  # a ValidationError is a ValueError
            raise OutputError(
                f"{self._words(shot)} was written by another version of llm-surgeon: {str(error).splitlines()[0]}.",
                f"Continue with that version, or remove {self._directory}, or give another --out.",
            ) from None

    def newest_whole(self) -> Checkpoint | None:
        """The newest checkpoint whose tensors are intact too; checking them takes as long as reading them."""
        while (found := self.newest()) is not None and not self._intact(found.shot, self._tensors(found.shot)):
            self._remove(found.shot)
        return found

    def restore(self, shot: int, model: PreTrainedModel, anatomy: Anatomy) -> RunState:
        """Give a dense model the weights and shapes of a checkpoint, in place.

        Args:
            shot: Number of the shot, whose checkpoint ``newest_whole`` has found intact.
            model: The dense model, as it was loaded and examined.
            anatomy: Layers of the model.

        Raises:
            OutputError: If the checkpoint does not hold what this version writes for such a model.
        """
        masks, start = restore_tensors(self._tensors(shot), model, anatomy)
        return RunState(shot, masks, start)

    def tidy(self) -> None:
        """Remove the files that a killed process left half-written."""
        for shot in self._numbers("safetensors") | self._numbers("json"):
            if not self._sums(shot).exists():
                self._remove(shot)

    def _numbers(self, ending: str) -> set[int]:
        names = (re.fullmatch(rf"shot-(\d+)\.{ending}", path.name) for path in self._directory.iterdir())
        return {int(found[1]) for found in names if found}

    def _tensors(self, shot: int) -> Path:
        return self._directory / f"shot-{shot}.safetensors"

    def _words(self, shot: int) -> Path:
        return self._directory / f"shot-{shot}.json"

    def _sums(self, shot: int) -> Path:
        return self._directory / f"shot-{shot}.sha256"

    def _remove(self, shot: int) -> None:
        # The checksums go first: without them, the other files are no checkpoint.
        for path in (self._sums(shot), self._words(shot), self._tensors(shot)):
            path.unlink(missing_ok=True)

    def _intact(self, shot: int, path: Path) -> bool:
        """Whether a file still matches its checksum; warns if not."""
        try:
            lines = self._sums(shot).read_text(encoding="utf8", errors="replace").splitlines()
            if f"{_digest(path)}  {path.name}" in lines:
                return True
        except OSError:
            pass
        logger.warning("the checkpoint of shot %d is damaged (%s), and is not used", shot, path.name)
        return False


def restore_tensors(path: Path, model: PreTrainedModel, anatomy: Anatomy) -> tuple[Masks, WarmStart | None]:
    """Give a model the weights and shapes of ``tensors_of``, in place.

    Args:
        path: A file of these tensors.
        model: The dense model as it was loaded and examined, or as a shot has left it.
        anatomy: Layers of the dense model.

    Returns:
        The masks, and the factors from which a power iteration starts.

    Raises:
        OutputError: If the file does not hold what this version writes for such a model.
    """
    try:
        tensors = TensorFile(path)
        masks = _read_masks(tensors, anatomy)
        _read_weights(tensors, model, anatomy, masks)
        return masks, _read_start(tensors, model, anatomy)
    # Tensors may be missing, or have another shape or type; values may be no numbers.
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{path} does not hold what a checkpoint of this model does: {' '.join(str(error).split())[:200]}.",
            f"Remove {path.parent}, or give another --out.",
        ) from None


def _text(checkpoint: Checkpoint) -> bytes:
    return (checkpoint.model_dump_json(indent=2) + "\n").encode("utf8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_of(model: PreTrainedModel, anatomy: Anatomy, state: RunState, config: PruneConfig) -> dict[str, Tensor]:
    """All tensors of a checkpoint.

    Args:
        model: The model, as the shot left it.
        anatomy: Layers of the dense model.
        state: State of the run after the shot.
        config: The recipe, which decides on the parameters that change beside the prunable layers.
    """
    layers = {} if config.permute else _layers(model, anatomy)
    return {
        name: tensor.contiguous()
        for part in (
            _parameters(model, parameters_beside(model, anatomy, config)),
            layers,
            _mask_tensors(state.masks),
            _start_tensors(state.start),
        )
        for name, tensor in part.items()
    }


def parameters_beside(model: nn.Module, anatomy: Anatomy, config: PruneConfig) -> list[str]:
    """Names of the parameters that a checkpoint holds beside the prunable layers; all parameters if channels move."""
    if config.permute:
        return [name for name, _ in model.named_parameters()]
    return changed_beside(model, anatomy, config)


def _parameters(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    return {f"parameter/{name}": model.get_parameter(name).detach() for name in names}


def _layers(model: nn.Module, anatomy: Anatomy) -> dict[str, Tensor]:
    tensors = {}
    for name, layer in anatomy.layers.items():
        core = core_of(model, layer)
        tensors[f"weight/{name}"] = core.weight.detach()
        if layer.bias:
            tensors[f"bias/{name}"] = core.bias.detach()
    return tensors


def _mask_tensors(masks: Masks) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if isinstance(mask, KeepMask):
            tensors |= {f"rows/{name}": mask.rows, f"columns/{name}": mask.columns}
        else:
            # A byte holds the masks of eight weights.
            tensors[f"elements/{name}"] = torch.from_numpy(np.packbits(mask.elements.numpy()))
    return tensors


def _start_tensors(start: WarmStart | None) -> dict[str, Tensor]:
    inputs = {} if start is None else start.inputs
    return {f"start {term}/{name}": a for name, terms in inputs.items() for term, a in enumerate(terms)}


def _read_masks(tensors: TensorFile, anatomy: Anatomy) -> Masks:
    if f"rows/{next(iter(anatomy.layers))}" in tensors:
        return {name: _read_mask(tensors, layer) for name, layer in anatomy.layers.items()}
    return {name: ElementMask(_elements(tensors, layer)) for name, layer in anatomy.layers.items()}


def _read_mask(tensors: TensorFile, layer: LinearLayer) -> KeepMask:
    rows, columns = (tensors[f"{axis}/{layer.name}"] for axis in AXES)
    if (rows.dtype, columns.dtype, rows.shape, columns.shape) != (
        *(torch.bool, torch.bool),
        *((layer.rows,), (layer.columns,)),
    ):
        raise ValueError(f"the masks of {layer.name} are none")
    return KeepMask(rows, columns)


def _elements(tensors: TensorFile, layer: LinearLayer) -> Tensor:
    bits = np.unpackbits(tensors[f"elements/{layer.name}"].numpy(), count=layer.rows * layer.columns)
    return torch.from_numpy(bits).bool().view(layer.rows, layer.columns)


@torch.no_grad()
def _read_weights(tensors: TensorFile, model: PreTrainedModel, anatomy: Anatomy, masks: Masks) -> None:
    parameters = dict(model.named_parameters())
    there = [name for name in parameters if f"parameter/{name}" in tensors]
    for name in there:
        weights_of(model).write(parameters[name], tensors[f"parameter/{name}"])
    if len(there) == len(parameters):
        return
    # Layers with masks of single weights keep their dense shape.
    shapes = anatomy.dense_masks() | {name: mask for name, mask in masks.items() if isinstance(mask, KeepMask)}
    extents = anatomy.extents(shapes)
    for name, layer in anatomy.layers.items():
        matrix = tensors[f"weight/{name}"]
        if tuple(matrix.shape) != shapes[name].shape or not is_finite(matrix):
            raise ValueError(f"{[*matrix.shape]} values of {name} are not {[*shapes[name].shape]} numbers")
        if layer.bias:
            matrix = torch.cat([matrix, tensors[f"bias/{name}"][:, None]], dim=1)
        write_matrix(model, layer, shapes[name], extents[name], matrix)
        weights_of(model).settle(model.get_submodule(name))
    narrow_heads(model, anatomy, shapes)


def _read_start(tensors: TensorFile, model: PreTrainedModel, anatomy: Anatomy) -> WarmStart | None:
    inputs: dict[str, list[Tensor]] = {name: [] for name in anatomy.layers}
    device = next(model.parameters()).device
    for name in anatomy.layers:
        while f"start {len(inputs[name])}/{name}" in tensors:
            inputs[name].append(tensors[f"start {len(inputs[name])}/{name}"].to(device))
    return WarmStart(inputs) if any(inputs.values()) else None
