"""Tensors that do not all fit: on the device as far as its budget goes, then in host memory, then on disk."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llm_surgeon.errors import DiskSpaceError
from llm_surgeon.stopwatch import timed


@dataclass(frozen=True)
class Budgets:
    """Bytes that stored tensors may take of the device (where it is a GPU) and of host memory; the rest is on disk."""

    device: float = math.inf
    host: float = math.inf


class Stored:
    """One tensor of a store.

    Args:
        held: The tensor, wherever it is.
        device: Where it is wanted.
        released: Called when its bytes are free again.
    """

    def __init__(self, held: Tensor, device: torch.device, released: Callable[[], None]) -> None:
        self._held: Tensor | None = held
        self._device, self._released = device, released

    def get(self) -> Tensor:
        """The tensor, on the device. It is the stored one itself if it is there already: not to be changed."""
        assert self._held is not None, "it has been released"
        with timed("transfers"):
            return self._held.to(self._device, non_blocking=True)

    def release(self) -> None:
        """Give its bytes back."""
        if self._held is not None:
            self._held = None
            self._released()


class TensorStore:
    """Keeps tensors where there is room.

    Files are removed as soon as they are mapped into memory, so that nothing is left of them however a run ends.

    Args:
        device: Where tensors come from and are wanted.
        budgets: How much may be kept where.
        scratch: Directory of the files; the system's temporary one if None.
    """

    def __init__(self, device: torch.device, budgets: Budgets | None = None, scratch: Path | None = None) -> None:
        self.device, self._scratch = device, scratch
        limits = budgets or Budgets()
        # On a CPU the device is the host.
        self._free = {"device": limits.device if device.type != "cpu" else 0.0, "host": limits.host}
        self.bytes_on_disk = 0

    def put(self, tensor: Tensor) -> Stored:
        """Keep a tensor; the caller gives up its own.

        Raises:
            DiskSpaceError: If it has to go to disk, and the disk is full.
        """
        size = tensor.nbytes
        place = next((name for name, free in self._free.items() if size <= free), None)
        if place is None:
            with timed("transfers"):
                held = _mapped(tensor.shape, tensor.dtype, self._scratch).copy_(tensor)
            self.bytes_on_disk += size
            return Stored(held, self.device, lambda: self._gone_from_disk(size))
        self._free[place] -= size
        if place == "host" and tensor.device.type != "cpu":
            with timed("transfers"):
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
        else:
            held = tensor.detach()
        return Stored(held, self.device, lambda: self._gone(place, size))

    def _gone(self, place: str, size: int) -> None:
        self._free[place] += size

    def _gone_from_disk(self, size: int) -> None:
        self.bytes_on_disk -= size


def _mapped(shape: torch.Size, dtype: torch.dtype, scratch: Path | None) -> Tensor:
    """A tensor in a file that has no name any more.

    Raises:
        DiskSpaceError: If the disk is full.
    """
    count = shape.numel()
    size = count * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    try:
        descriptor, name = tempfile.mkstemp(prefix="llm-surgeon-", dir=scratch)
    except OSError as error:
        raise _full(scratch, size, error) from None
    try:
        # Without its blocks reserved, a full disk would only show when the memory is written to, and end the process.
        os.posix_fallocate(descriptor, 0, size)
        return torch.from_file(name, shared=True, size=count, dtype=dtype).view(shape)
    except OSError as error:
        raise _full(scratch, size, error) from None
    finally:
        os.close(descriptor)
        os.unlink(name)


def _full(scratch: Path | None, size: int, error: OSError) -> DiskSpaceError:
    place = scratch or Path(tempfile.gettempdir())
    return DiskSpaceError(
        f"{size / 2**20:.0f} MiB that do not fit into memory cannot be kept in {place}: {error.strerror}.",
        "Free some space there, set TMPDIR to a directory with more, or raise --host-memory.",
    )
