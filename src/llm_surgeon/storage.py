"""Tensors that do not all fit: on the device as far as its budget goes, then in host memory, then on disk."""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

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
    """One tensor of a store; its bytes are given back with ``release``, or when nobody holds it any more.

    Args:
        read: Gives the tensor, wherever it is.
        device: Where it is wanted.
        released: Called when its bytes are free again.
    """

    def __init__(self, read: Callable[[], Tensor], device: torch.device, released: Callable[[], None]) -> None:
        self._read: Callable[[], Tensor] | None = read
        self._device = device
        self._gone = weakref.finalize(self, released)
        self._gone.atexit = False

    def get(self) -> Tensor:
        """The tensor, on the device. It may be the stored one itself: not to be changed."""
        assert self._read is not None, "it has been released"
        with timed("transfers"):
            return self._read().to(self._device, non_blocking=True)

    def release(self) -> None:
        """Give its bytes back."""
        self._read = None
        self._gone()  # the first time only


class TensorStore:
    """Keeps tensors where there is room.

    Args:
        device: Where tensors come from and are wanted.
        budgets: How much may be kept where.
        scratch: Directory of what is on disk; the system's temporary one if None.
    """

    def __init__(self, device: torch.device, budgets: Budgets | None = None, scratch: Path | None = None) -> None:
        self.device = device
        limits = budgets or Budgets()
        # On a CPU the device is the host.
        self._free = {"device": limits.device if device.type != "cpu" else 0.0, "host": limits.host}
        self._disk = _ScratchFile(scratch)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes that are on disk now."""
        return self._disk.used

    def put(self, tensor: Tensor) -> Stored:
        """Keep a tensor; the caller gives up its own.

        Raises:
            DiskSpaceError: If it has to go to disk, and the disk is full.
        """
        size = tensor.nbytes
        place = next((name for name, free in self._free.items() if size <= free), None)
        with timed("transfers"):
            if place is None:
                start = self._disk.write(tensor)
                read = partial(self._disk.read, start, tensor.shape, tensor.dtype)
                return Stored(read, self.device, partial(self._disk.free, start, size))
            self._free[place] -= size
            if place == "host" and tensor.device.type != "cpu":
                held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
            else:
                held = tensor.detach()
        return Stored(lambda: held, self.device, partial(self._give_back, place, size))

    def _give_back(self, place: str, size: int) -> None:
        self._free[place] += size


class _ScratchFile:
    """Tensors in a file without a name, of which nothing is left however the process ends.

    Read and written rather than mapped: mapped pages count as memory of the process.

    Attributes:
        used: Bytes of the tensors in it.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._end = self.used = 0
        # Tensors of a pass come in few sizes, so what is given back fits the next one.
        self._holes: dict[int, list[int]] = {}

    def write(self, tensor: Tensor) -> int:
        """Write a tensor; returns where.

        Raises:
            DiskSpaceError: If the disk is full.
        """
        size = tensor.nbytes
        holes = self._holes.get(size)
        start = holes.pop() if holes else self._end
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115  # as long as the store
            self._file.seek(start)
            left = _bytes_of(tensor.detach().cpu().contiguous())
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise not_kept(self._directory, size, error) from None
        self._end = max(self._end, start + size)
        self.used += size
        return start

    def read(self, start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Read a tensor."""
        assert self._file is not None
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        left = _bytes_of(tensor)
        while left:
            left = left[self._file.readinto(left) :]  # type: ignore[attr-defined]
        return tensor

    def free(self, start: int, size: int) -> None:
        """Give the place of a tensor to others."""
        self._holes.setdefault(size, []).append(start)
        self.used -= size


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, whatever its type."""
    return tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def not_kept(directory: Path | None, size: int, error: OSError) -> DiskSpaceError:
    """What to say when a scratch file cannot take so many bytes; None is the system's directory for such files."""
    place = directory or Path(tempfile.gettempdir())
    return DiskSpaceError(
        f"{size / 2**20:.0f} MiB that do not fit into memory cannot be kept in {place}: {error.strerror}.",
        "Free some space there, set TMPDIR to a directory with more, or raise --host-memory.",
    )
