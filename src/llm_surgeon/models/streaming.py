"""Weights of blocks that wait in mapped files, and are where the model runs only while their block is run.

A model that fits neither a GPU nor main memory may still fit block by block. Each weight of a block is a tensor in a
file without a name that is mapped into memory: whoever reads or writes it does so as ever, and the kernel brings and
takes its pages. On a CPU that is all. For a GPU the block that is run is copied there and forgotten again; what is run
block by block (``passes/sweep.py``) keeps it there for all batches, and the next one arrives meanwhile.

What is not in a block (embeddings, last norm, head) stays where the model runs.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    """Weights that stay where they are: nothing to do.

    Attributes:
        blocks: Path of the list of blocks whose weights are streamed; None if none are.
    """

    blocks: str | None = None

    @contextmanager
    def present(self, _module: nn.Module) -> Iterator[None]:
        """The weights of a block, or of a layer in one, are where the model runs; there they are not to be changed."""
        yield

    def expect(self, _module: nn.Module) -> None:
        """Let the weights of a block come, which are not to be changed before it has been ``present`` next."""

    def settle(self, _module: nn.Module) -> None:
        """Put weights away that have been written to a block or a layer while they were not ``present``.

        Raises:
            DiskSpaceError: If the disk is full.
        """

    def forget(self) -> None:
        """Let go of what was read of the weights in passing: it is read again when it is needed."""


class StreamedWeights(Weights):
    """Weights that come and go.

    Args:
        model: On the CPU, its weights as the checkpoint has them; changed in place.
        blocks: Path of its list of decoder blocks.
        device: Where it is to run.
        dtype: Type that its weights are to have.
        scratch: Directory of the files; the system's temporary one if None.

    Raises:
        DiskSpaceError: If the weights do not fit there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: str,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path | None = None,
    ) -> None:
        self.blocks = blocks
        self._device, self._scratch = device, scratch
        self._modules = cast(nn.ModuleList, model.get_submodule(blocks))
        # Not the model: that would keep it alive for ever, see ``stream``.
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
            if id(tensor) not in inside:
                kind = dtype if id(tensor) in parameters else tensor.dtype
                # A copy in any case: the checkpoint's file stays mapped as long as any tensor lies in it.
                tensor.data = tensor.data.to(device, kind, copy=True)

    @contextmanager
    def present(self, module: nn.Module) -> Iterator[None]:
        """Bring the weights of a block or a layer, unless they are there."""
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
        """Let the weights of a block come; on a CPU they are there already."""
        if self._moves and module not in self._present:
            # Those of others are not wanted any more: there is room for two blocks.
            self._coming = {module: [self._transfers.begin(partial(self._arriving, x.data)) for x in _tensors(module)]}

    def settle(self, module: nn.Module) -> None:
        """Put what is not in a file yet into one; what is on its way may be what was there before."""
        self._coming.clear()
        for tensor in _tensors(module):
            if tensor.numel() and not _is_mapped(tensor):
                tensor.data = self._mapped(tensor.data)
            forget_pages(tensor)

    def forget(self) -> None:
        """The pages of all blocks."""
        for tensor in _tensors(self._modules):
            forget_pages(tensor)

    @property
    def _moves(self) -> bool:
        return self._device.type != "cpu"

    def _arriving(self, home: Tensor) -> Tensor:
        return home.to(self._device)

    def _with_weights(self, block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward function of a block, for which its weights come."""

        @functools.wraps(forward)
        def run(*arguments: Any, **named: Any) -> Any:
            with self.present(block):
                return forward(*arguments, **named)

        return run

    def _mapped(self, tensor: Tensor) -> Tensor:
        """A copy in a mapped file of its own, of which nothing is left once nobody holds the tensor."""
        try:
            with tempfile.NamedTemporaryFile(dir=self._scratch, prefix="llm-surgeon-weights-") as file:
                # A mapped page that the disk has no room for would end the process without a word.
                os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
                copy = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        except OSError as error:
            raise not_kept(self._scratch, tensor.nbytes, error) from None
        return copy.view(tensor.shape).copy_(tensor)


# Which models' weights are streamed; an entry goes when its model does.
_STREAMED: WeakKeyDictionary[nn.Module, StreamedWeights] = WeakKeyDictionary()
_RESIDENT = Weights()


def stream(
    model: PreTrainedModel, blocks: str, device: torch.device, dtype: torch.dtype, scratch: Path | None = None
) -> None:
    """Let the weights of a model's blocks come and go from now on, see ``StreamedWeights``.

    Raises:
        DiskSpaceError: If the weights do not fit on the disk.
    """
    _STREAMED[model] = StreamedWeights(model, blocks, device, dtype, scratch)


def weights_of(model: nn.Module) -> Weights:
    """How the weights of a model are to be had."""
    return _STREAMED.get(model, _RESIDENT)


def can_stream() -> bool:
    """Whether this system can reserve the room of a mapped file before it is written."""
    return hasattr(os, "posix_fallocate")


def require_streaming(wanted: str) -> None:
    """Find out early whether weights can be streamed, if ``wanted`` is ``streamed``.

    Raises:
        ConfigError: If they cannot.
    """
    if wanted == "streamed" and not can_stream():
        raise ConfigError("This system cannot stream weights: it has no posix_fallocate.", "Use --weights resident.")


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _is_mapped(tensor: Tensor) -> bool:
    return tensor.untyped_storage().filename is not None
