"""Streamed weights: those of blocks wait in mapped files, and are on the device only while their block is run.

A model that fits neither a GPU nor main memory may still fit block by block. Each weight of a block is a tensor in a
mapped file without a name: it is read and written as ever, and the kernel brings and takes its pages. On a CPU that is
all. For a GPU the block that is run is copied there and forgotten again. A sweep block by block (``passes/sweep.py``)
keeps the block there for all batches, and the next block arrives meanwhile.

Weights outside the blocks (embeddings, last norm, head) stay on the device.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.errors import ConfigError
from llm_surgeon.stopwatch import timed
from llm_surgeon.system.allocator import forget_pages
from llm_surgeon.system.storage import not_kept
from llm_surgeon.system.transfers import Transfers


class Weights:
    """Resident weights, which stay on the device: every method does nothing.

    Attributes:
        blocks: Path of the list of blocks whose weights are streamed; None if none are.
    """

    blocks: str | None = None

    @contextmanager
    def present(self, _module: nn.Module) -> Iterator[None]:
        """Have the weights of a block, or of a layer in one, on the device; within, they must not be changed."""
        yield

    def expect(self, _module: nn.Module) -> None:
        """Begin to bring the weights of a block; they must not be changed before its next ``present``."""

    def settle(self, _module: nn.Module) -> None:
        """Put weights into files that were written to a block or a layer while it was not ``present``.

        Raises:
            DiskSpaceError: If the disk is full.
        """

    def forget(self) -> None:
        """Drop the pages of weights that were read in passing; they are read again when they are needed."""

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Write values of the same shape into a parameter that is not ``present``; copies of the model do not change.

        Raises:
            DiskSpaceError: If the disk is full.
        """
        parameter.data.copy_(values)

    def kept(self, parameter: Tensor) -> Tensor:
        """The values of a parameter, which stay as they are when it is written to."""
        return parameter.data.clone()

    def copy(self, model: PreTrainedModel, shared: Mapping[int, Tensor]) -> PreTrainedModel:
        """Copy of a model with weights of its own.

        Args:
            model: The model.
            shared: Parameters that are never written to, by their ``id``; the copy may have the same.
        """
        return deepcopy(model, dict(shared))


class StreamedWeights(Weights):
    """Streamed weights, which come to the device for their block and go again.

    Args:
        model: A model on the CPU with weights of the type in the checkpoint; changed in place.
        blocks: Path of its list of decoder blocks.
        device: Device on which the model is to run.
        dtype: Type that its weights are to have.
        scratch: Directory of the files; the system's temporary one if None.
        arrived: Whether the weights outside the blocks are on the device already, as those of a copy.

    Raises:
        DiskSpaceError: If the weights do not fit on the disk.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: str,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path | None = None,
        *,
        arrived: bool = False,
    ) -> None:
        self.blocks = blocks
        self._device, self._dtype, self._scratch = device, dtype, scratch
        self._modules = cast(nn.ModuleList, model.get_submodule(blocks))
        # The model itself is not kept: that would keep it alive for ever, see ``stream``.
        self._present: set[nn.Module] = set()
        self._transfers = Transfers(device)
        self._coming: dict[nn.Module, list[Callable[[], Tensor]]] = {}
        inside = set()
        for block in self._modules:
            for parameter in block.parameters():
                parameter.data = parameter.data.to(dtype)
            self.settle(block)
            vars(block)["forward"] = self._with_weights(block, block.forward)
            inside |= {id(tensor) for tensor in _tensors(block)}
        parameters = {id(parameter) for parameter in model.parameters()}
        for tensor in _tensors(model):
            if id(tensor) not in inside and not arrived:
                kind = dtype if id(tensor) in parameters else tensor.dtype
                # A copy in any case: the checkpoint's file stays mapped as long as any tensor lies in it.
                tensor.data = tensor.data.to(device, kind, copy=True)

    @contextmanager
    def present(self, module: nn.Module) -> Iterator[None]:
        """Bring the weights of a block or a layer to the device, unless they are there."""
        if module in self._present:
            yield
            return
        homes = [(tensor, tensor.data) for tensor in _tensors(module)]
        self._present.add(module)
        try:
            with timed("transfers"):
                arriving = self._coming.pop(module, None) or [partial(self._arriving, home) for _tensor, home in homes]
                for (tensor, _home), arrived in zip(homes, arriving, strict=True):
                    tensor.data = arrived()
            yield
        finally:
            self._present.remove(module)
            for tensor, home in homes:
                tensor.data = home
                forget_pages(home)

    def expect(self, module: nn.Module) -> None:
        """Begin to bring the weights of a block; on a CPU they are there already."""
        if self._moves and module not in self._present:
            # Weights of other blocks on their way are dropped: there is room for two blocks only.
            self._coming = {module: [self._transfers.begin(partial(self._arriving, x.data)) for x in _tensors(module)]}

    def settle(self, module: nn.Module) -> None:
        """Put tensors into files that are in none yet, and drop copies on their way, which may be of former weights."""
        self._coming.clear()
        for tensor in _tensors(module):
            if tensor.numel() and not _is_mapped(tensor):
                tensor.data = self._mapped(tensor.data)
            forget_pages(tensor)

    def forget(self) -> None:
        """Drop the pages of all blocks; see ``Weights.forget``."""
        for tensor in _tensors(self._modules):
            forget_pages(tensor)

    def write(self, parameter: Tensor, values: Tensor) -> None:
        """Write values into a new file, as others may read the old one, or take over the file that they are in."""
        if not _is_mapped(parameter):
            super().write(parameter, values)
            return
        former = parameter.data
        taken = _is_mapped(values) and values.dtype == parameter.dtype
        parameter.data = values if taken else self._mapped(values.to(parameter.dtype))
        for tensor in (former, values, parameter):
            forget_pages(tensor)
        self._coming.clear()

    def kept(self, parameter: Tensor) -> Tensor:
        """The values of a parameter: in their file, to which nothing is written any more."""
        return parameter.data if _is_mapped(parameter) else super().kept(parameter)

    def copy(self, model: PreTrainedModel, shared: Mapping[int, Tensor]) -> PreTrainedModel:
        """Copy of a model whose weights lie in the same files, until one of the two is written to."""
        same = dict(shared)
        for tensor in _tensors(self._modules):
            values = tensor.data
            same[id(tensor)] = nn.Parameter(values, False) if isinstance(tensor, nn.Parameter) else values
        copied = deepcopy(model, same)
        assert self.blocks is not None
        for block in cast(nn.ModuleList, copied.get_submodule(self.blocks)):
            # It would bring the weights of the original.
            del vars(block)["forward"]
        _STREAMED[copied] = StreamedWeights(copied, self.blocks, self._device, self._dtype, self._scratch, arrived=True)
        return copied

    @property
    def _moves(self) -> bool:
        return self._device.type != "cpu"

    def _arriving(self, home: Tensor) -> Tensor:
        return home.to(self._device)

    def _with_weights(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the forward function of a block, so that its weights are present while it runs."""

        @functools.wraps(forward)
        def run(*arguments: Any, **named: Any) -> Any:
            with self.present(block):
                return forward(*arguments, **named)

        return run

    def _mapped(self, tensor: Tensor) -> Tensor:
        """Copy a tensor into a mapped file of its own, which is gone once nobody holds the copy."""
        try:
            with tempfile.NamedTemporaryFile(dir=self._scratch, prefix="llm-surgeon-weights-") as file:
                # Reserved now: a mapped page without room on the disk would end the process without a message.
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
                copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:
            raise not_kept(self._scratch, tensor.nbytes, error) from None
        return copy.view(tensor.shape).copy_(tensor)


# Models whose weights are streamed; an entry goes when its model does.
_STREAMED: WeakKeyDictionary[nn.Module, StreamedWeights] = WeakKeyDictionary()
_RESIDENT = Weights()


def stream(
    model: PreTrainedModel, blocks: str, device: torch.device, dtype: torch.dtype, scratch: Path | None = None
) -> None:
    """Stream the weights of a model's blocks from now on, see ``StreamedWeights``.

    Raises:
        DiskSpaceError: If the weights do not fit on the disk.
    """
    _STREAMED[model] = StreamedWeights(model, blocks, device, dtype, scratch)


def weights_of(model: nn.Module) -> Weights:
    """Weights of a model: streamed if ``stream`` was called for it, else resident."""
    return _STREAMED.get(model, _RESIDENT)


def can_stream() -> bool:
    """Tell whether this system can stream weights: it must reserve room for a mapped file before that is written."""
    return hasattr(os, "posix_fallocate")


def require_streaming(wanted: str) -> None:
    """Make sure, before anything expensive, that weights can be streamed, if ``wanted`` is ``streamed``.

    Raises:
        ConfigError: If this system cannot stream weights.
    """
    if wanted == "streamed" and not can_stream():
        raise ConfigError("This system cannot stream weights: it has no posix_fallocate.", "Use --weights resident.")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _is_mapped(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None
