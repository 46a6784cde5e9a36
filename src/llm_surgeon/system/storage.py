"""Storage of tensors that do not all fit: on the device as far as its budget goes, then in host memory, then on disk.

Tensors are moved beside the computation. A tensor leaves the device as soon as it is put, and comes back early if the
caller says that it is wanted next (``in_turn``).
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

from llm_surgeon.errors import ConfigError, DiskSpaceError
from llm_surgeon.stopwatch import timed
from llm_surgeon.system.allocator import hand_back_freed_memory
from llm_surgeon.system.transfers import Transfers

T = TypeVar("T")

# Share of the process's limit from which on it keeps no freed memory, at most: the work of one block has to fit into
# the rest, as the memory is looked at again behind it.
_NEAR = 0.85
# The same before work that takes much at once: logits, or all weights of a file.
_MUCH = 0.5


@dataclass(frozen=True)
class Budgets:
    """Bytes that stored tensors may take of the device (where it is a GPU) and of host memory; the rest is on disk.

    Attributes:
        device: Bytes of the device.
        host: Bytes of host memory.
        disk: Bytes of the disk.
        process: Bytes of host memory that the whole process may come to hold, see ``TensorStore.keep_within``.
        work: Bytes of them that the work of one block takes.
    """

    device: float = math.inf
    host: float = math.inf
    disk: float = math.inf
    process: float = math.inf
    work: float = 0.0


class Stored:
    """One tensor of a store; its bytes are given back with ``release``, or when nobody holds it any more.

    Args:
        read: Returns the tensor on the device.
        released: Called when its bytes are free again.
        transfers: Transfers that bring the tensor beside the computation; None where it is on the device.
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
        """Begin to bring the tensor to the device: it will be asked for soon."""
        assert self._read is not None, "it has been released"
        if self._coming is None:
            self._coming = self._read if self._transfers is None else self._transfers.begin(self._read)

    def get(self) -> Tensor:
        """The tensor, on the device. It may be the stored one itself, and must not be changed.

        Raises:
            DiskSpaceError: If the tensor could not be written to disk.
        """
        with timed("transfers"):
            self.expect()
            assert self._coming is not None
            coming, self._coming = self._coming, None
            return coming()

    def release(self) -> None:
        """Give the bytes of the tensor back."""
        self._read = self._coming = None
        self._gone()  # a finalizer acts the first time only


def in_turn(stored: Sequence[Stored]) -> Iterator[Stored]:
    """Go through stored tensors in order, with the next one on its way meanwhile."""
    for number, this in enumerate(stored, start=1):
        if number < len(stored):
            stored[number].expect()
        yield this


class TensorStore:
    """Store of tensors, which keeps each where there is room.

    Args:
        device: Device that tensors come from and return to.
        budgets: Bytes that may be kept on the device and on the host.
        scratch: Directory for tensors on disk; the system's temporary one if None.
    """

    def __init__(self, device: torch.device, budgets: Budgets | None = None, scratch: Path | None = None) -> None:
        self.device = device
        limits = budgets or Budgets()
        # On a CPU the device is the host.
        self._free = {"device": limits.device if device.type != "cpu" else 0.0, "host": limits.host}
        # The least is a half, as handing back costs page faults, and there may be nothing to hand back.
        near = min(_NEAR * limits.process, limits.process - limits.work)
        self._much = _MUCH * limits.process
        self._near = max(near, self._much)
        self._disk = _ScratchFile(scratch, limits.disk)
        self._transfers = Transfers(device)
        self._leaving: Callable[[], object] | None = None

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the tensors that are on disk now."""
        return self._disk.used

    def keep_within(self, *, much: bool = False) -> None:
        """Hand freed memory back if the process comes near its limit; to be called before each block's work.

        Memory that a pass frees lies in gaps between tensors that it keeps. The next tensors do not all fit there,
        least of all those of pruned layers, of which no two have the same size.

        Args:
            much: Whether the work that comes takes much memory at once.
        """
        if psutil.Process().memory_info().rss > (self._much if much else self._near):
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
        """Begin to move a tensor away; one at a time, as it takes memory of the device until it has left."""
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

    The file is read and written rather than mapped: mapped pages count as memory of the process. One thread alone reads
    and writes; other threads reserve and free ranges.

    Args:
        directory: Directory of the file; the system's temporary one if None.
        limit: Largest size of the file in bytes.

    Attributes:
        used: Bytes of the tensors in the file.
    """

    def __init__(self, directory: Path | None, limit: float = math.inf) -> None:
        self._directory, self._limit = directory, limit
        self._file: IO[bytes] | None = None
        self._end = self.used = 0
        # Tensors of a pass come in few sizes, so a range that was freed fits a later tensor.
        self._holes: dict[int, list[int]] = {}

    def reserve(self, size: int) -> int:
        """Reserve a range of so many bytes; returns its start.

        Raises:
            DiskSpaceError: If no file can be made, or the file would exceed its limit.
        """
        if self._file is None:
            try:
                self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115  # as long as the store
            except OSError as error:
                raise not_kept(self._directory, size, error) from None
        holes = self._holes.get(size)
        start = holes.pop() if holes else self._end
        if start + size > self._limit:
            raise not_kept(self._directory, size, OSError(0, f"it may take {self._limit / 2**20:.0f} MiB there"))
        self._end = max(self._end, start + size)
        self.used += size
        return start

    def write(self, start: int, tensor: Tensor) -> None:
        """Write a tensor to the range that begins at ``start``.

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
        """Read a tensor of this shape and type from the range that begins at ``start``, into host memory."""
        assert self._file is not None
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        left = _bytes_of(tensor)
        while left:
            left = left[self._file.readinto(left) :]  # type: ignore[attr-defined]
        return tensor

    def free(self, start: int, size: int) -> None:
        """Free the range of a tensor for others."""
        self._holes.setdefault(size, []).append(start)
        self.used -= size


def _bytes_of(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous tensor of any type."""
    return tensor.flatten().view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _pinned(tensor: Tensor) -> Tensor:
    """Copy of a tensor in pinned host memory, which a GPU can read by itself."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def check_scratch(directory: str | None) -> None:
    """Make sure that files can be made in a directory; None, the system's temporary one, is tried when it is needed.

    Raises:
        ConfigError: If they cannot.
    """
    if directory is None:
        return
    try:
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(
            f"Nothing can wait in {directory}: {error.strerror}.",
            "Give a directory that exists, and that can be written to, as --scratch.",
        ) from None


def not_kept(directory: Path | None, size: int, error: OSError) -> DiskSpaceError:
    """Error for a scratch file that cannot take ``size`` bytes; the directory None is the system's temporary one."""
    used = directory or Path(tempfile.gettempdir())
    return DiskSpaceError(
        f"{size / 2**20:.0f} MiB that do not fit into memory cannot be kept in {used}: {error.strerror}.",
        "Free some space there, give a directory with more as --scratch, or raise --host-memory or --scratch-space.",
    )
