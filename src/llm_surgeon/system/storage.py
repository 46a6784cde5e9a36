"""Tensors that do not all fit: on the device as far as its budget goes, then in host memory, then on disk.

What is not where it is wanted is moved while others are computed with: it leaves as soon as it is put, and whoever
knows what is wanted next says so (``in_turn``).
"""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TypeVar

import psutil
import torch
from torch import Tensor

from llm_surgeon.errors import DiskSpaceError
from llm_surgeon.stopwatch import timed
from llm_surgeon.system.allocator import hand_back_freed_memory
from llm_surgeon.system.transfers import Transfers

T = TypeVar("T")

# Share of what the process may hold from which on it keeps no freed memory; the rest is for what comes until it is
# looked at again, which is the work of one block.
_NEAR = 0.85


@dataclass(frozen=True)
class Budgets:
    """Bytes that stored tensors may take of the device (where it is a GPU) and of host memory; the rest is on disk.

    Attributes:
        device: Of the device.
        host: Of host memory.
        process: What the whole process may come to hold of host memory, see ``TensorStore.keep_within``.
    """

    device: float = math.inf
    host: float = math.inf
    process: float = math.inf


class Stored:
    """One tensor of a store; its bytes are given back with ``release``, or when nobody holds it any more.

    Args:
        read: Gives the tensor where it is wanted.
        released: Called when its bytes are free again.
        transfers: Who brings it, while others are computed with; None where there is nothing to bring.
    """

    def __init__(
        self, read: Callable[[], Tensor], released: Callable[[], None], transfers: Transfers | None = None
    ) -> None:
        self._read: Callable[[], Tensor] | None = read
        self._transfers = transfers
        self._coming: Callable[[], Tensor] | None = None
        self._gone = weakref.finalize(self, released)
        self._gone.atexit = False

    def expect(self) -> None:
        """Let it come: it will be asked for soon."""
        assert self._read is not None, "it has been released"
        if self._coming is None:
            self._coming = self._read if self._transfers is None else self._transfers.begin(self._read)

    def get(self) -> Tensor:
        """The tensor, on the device. It may be the stored one itself: not to be changed.

        Raises:
            DiskSpaceError: If it could not be kept.
        """
        with timed("transfers"):
            self.expect()
            assert self._coming is not None
            coming, self._coming = self._coming, None
            return coming()

    def release(self) -> None:
        """Give its bytes back."""
        self._read = self._coming = None
        self._gone()  # the first time only


def in_turn(stored: Sequence[Stored]) -> Iterator[Stored]:
    """Each of several, in order; the one after it is on its way meanwhile."""
    for number, this in enumerate(stored, start=1):
        if number < len(stored):
            stored[number].expect()
        yield this


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
        self._process = limits.process
        self._disk = _ScratchFile(scratch)
        self._transfers = Transfers(device)
        self._leaving: Callable[[], object] | None = None

    @property
    def bytes_on_disk(self) -> int:
        """Bytes that are on disk now."""
        return self._disk.used

    def keep_within(self) -> None:
        """Hand freed memory back if the process comes near what it may hold; to be called before each block's work.

        What a pass frees lies in gaps between what it keeps, and the next tensors do not all fit there, least of all
        those of pruned layers, of which no two have one size.
        """
        if psutil.Process().memory_info().rss > _NEAR * self._process:
            hand_back_freed_memory()

    def put(self, tensor: Tensor) -> Stored:
        """Keep a tensor; the caller gives up its own, and does not change it any more.

        Raises:
            DiskSpaceError: If this or an earlier one has to go to disk, and the disk is full; ``get`` says so as well.
        """
        tensor, size = tensor.detach(), tensor.nbytes
        level = next((name for name, free in self._free.items() if size <= free), None)
        if level is None:
            start = self._disk.reserve(size)
            written = self._leave(lambda: self._disk.write(start, tensor))
            read = partial(self._from_disk, written, start, tensor.shape, tensor.dtype)
            return Stored(read, partial(self._disk.free, start, size), self._transfers)
        self._free[level] -= size
        released = partial(self._give_back, level, size)
        if level == "host" and tensor.device.type != "cpu":
            kept = self._leave(lambda: _pinned(tensor))
            return Stored(lambda: kept().to(self.device, non_blocking=True), released, self._transfers)
        return Stored(lambda: tensor, released)

    def _leave(self, move: Callable[[], T]) -> Callable[[], T]:
        """Begin to move what was put; one at a time, as it takes the place where it was until it has left."""
        with timed("transfers"):
            if self._leaving is not None:
                self._leaving()
            self._leaving = leaving = self._transfers.begin(move)
        return leaving

    def _from_disk(self, written: Callable[[], None], start: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        written()
        return self._disk.read(start, shape, dtype).to(self.device, non_blocking=True)

    def _give_back(self, level: str, size: int) -> None:
        self._free[level] += size


class _ScratchFile:
    """Tensors in a file without a name, of which nothing is left however the process ends.

    Read and written rather than mapped: mapped pages count as memory of the process. Both by one thread only; places
    are given and taken back by the others.

    Attributes:
        used: Bytes of the tensors in it.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self._end = self.used = 0
        # Tensors of a pass come in few sizes, so what is given back fits the next one.
        self._holes: dict[int, list[int]] = {}

    def reserve(self, size: int) -> int:
        """A place for so many bytes; returns where it begins.

        Raises:
            DiskSpaceError: If there can be no file.
        """
        if self._file is None:
            try:
                self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115  # as long as the store
            except OSError as error:
                raise not_kept(self._directory, size, error) from None
        holes = self._holes.get(size)
        start = holes.pop() if holes else self._end
        self._end = max(self._end, start + size)
        self.used += size
        return start

    def write(self, start: int, tensor: Tensor) -> None:
        """Write a tensor to its place.

        Raises:
            DiskSpaceError: If the disk is full.
        """
        assert self._file is not None
        left = _bytes_of(tensor.cpu().contiguous())
        try:
            self._file.seek(start)
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise not_kept(self._directory, tensor.nbytes, error) from None

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


def _pinned(tensor: Tensor) -> Tensor:
    """A copy in host memory that a GPU can read by itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def not_kept(directory: Path | None, size: int, error: OSError) -> DiskSpaceError:
    """What to say when a scratch file cannot take so many bytes; None is the system's directory for such files."""
    used = directory or Path(tempfile.gettempdir())
    return DiskSpaceError(
        f"{size / 2**20:.0f} MiB that do not fit into memory cannot be kept in {used}: {error.strerror}.",
        "Free some space there, set TMPDIR to a directory with more, or raise --host-memory.",
    )
