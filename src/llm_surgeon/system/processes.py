"""Processes of one run: their shares of the work, and sums and broadcasts among them, by ``torch.distributed``.

Every process holds the whole model and takes the same steps in the same order. Each reads its own part of the tokens.
Work that needs no tokens (decompositions, costs, updates) is shared out layer by layer.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, zip_longest
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from llm_surgeon.errors import ConfigError, ProcessError
from llm_surgeon.system.torchrun import own_place

if TYPE_CHECKING:
    from types import FrameType

T = TypeVar("T")

# Time that a process waits for the others, which may be writing a large export. An ended one is noticed at once.
_PATIENCE = timedelta(hours=6)
_STORE_PATIENCE = timedelta(seconds=10)
_CPU = torch.device("cpu")
# Counts how often this process has joined others: each time needs keys of its own in torchrun's store.
_joins = count()


@dataclass(frozen=True)
class _Blank:
    """Announcement of a tensor that is about to be broadcast."""

    shape: torch.Size
    dtype: torch.dtype
    on_cpu: bool


@dataclass(frozen=True)
class Processes:
    """Position of this process among those of its run; by default it is the only one.

    All processes have to call the same methods in the same order. With one process, each method returns its input.

    Attributes:
        rank: Number of this process, from 0.
        count: Number of processes.
        device: Device on which this process computes.
    """

    rank: int = 0
    count: int = 1
    device: torch.device = _CPU

    @property
    def first(self) -> bool:
        """True in the first process, which writes, shows and measures all that is not shared out."""
        return self.rank == 0

    def part(self, items: int) -> slice:
        """Slice of this process of so many items: slices follow one another and differ by one item at most."""
        return slice(items * self.rank // self.count, items * (self.rank + 1) // self.count)

    def own(self, items: Sequence[T]) -> Sequence[T]:
        """Part of this process of a sequence."""
        return items[self.part(len(items))]

    def check_samples(self, samples: int, each: int = 1) -> None:
        """Make sure that every process gets at least ``each`` of the calibration sequences.

        Raises:
            ConfigError: If there are fewer sequences.
        """
        if samples < each * self.count:
            raise ConfigError(
                f"{samples} calibration sequences cannot be shared out among {self.count} processes, {each} to each.",
                "Raise --samples, or start fewer processes.",
            )

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place, bit for bit the same in all.

        Raises:
            ProcessError: If another process is gone.
        """
        if self.count == 1:
            return
        with _company():
            pending = [dist.all_reduce(tensor, async_op=True) for tensor in tensors if tensor.numel()]
            for work in pending:
                work.wait()

    def largest(self, tensor: Tensor) -> None:
        """Replace a tensor by the largest of each element over the processes, in place.

        Raises:
            ProcessError: If another process is gone.
        """
        if self.count > 1:
            with _company():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX)

    def total(self, *numbers: float) -> list[float]:
        """Sums of numbers over the processes.

        Raises:
            ProcessError: If another process is gone.
        """
        if self.count == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.add_up([sums])
        return sums.tolist()

    def from_first(self, work: Callable[[], T]) -> T:
        """Do some work in the first process only, while the others wait for its result.

        Raises:
            ProcessError: If another process is gone.
        """
        return self.broadcast(work() if self.first else None, 0)

    def broadcast(self, value: T | None, source: int) -> T:
        """Hand the value of one process to all.

        Tensors, alone or in a tuple, arrive on the device of each process if they are not on the CPU; other objects
        have to be such as can be pickled, and on the CPU.

        Args:
            value: The value of the source; ignored in the other processes.
            source: Number of the process that has the value.

        Raises:
            ProcessError: If another process is gone.
        """
        if self.count == 1:
            return cast(T, value)
        parts = value if isinstance(value, tuple) else (value,)
        message: list[Any] = [(isinstance(value, tuple), [_announced(part) for part in parts])]
        with _company():
            dist.broadcast_object_list(message, source, device=_CPU)
        together, announced = message[0]
        if self.rank != source:
            parts = tuple(self._room(part) for part in announced)
        with _company():
            for part in parts:
                if isinstance(part, Tensor) and part.numel():
                    dist.broadcast(part.contiguous(), source)
        return cast(T, parts if together else parts[0])

    def _room(self, part: Any) -> Any:
        """Empty tensor to receive an announced one in; any other object has arrived already, and is returned."""
        if not isinstance(part, _Blank):
            return part
        return torch.empty(part.shape, dtype=part.dtype, device=_CPU if part.on_cpu else self.device)

    def share_out(self, work: Mapping[str, float], compute: Callable[[str], T]) -> Iterator[tuple[str, T]]:
        """Compute pieces of work, each in one process, and hand all results to every process.

        Results come when each process has one more, so that no more than ``count`` are under way at once.

        Args:
            work: Cost of each piece by name, in any unit.
            compute: Computes a piece; its result has to be one that ``broadcast`` can hand over.

        Yields:
            Names and results, in an order that depends on ``work`` and ``count`` only.

        Raises:
            ProcessError: If another process is gone.
        """
        for turn in zip_longest(*shares(work, self.count)):
            own = turn[self.rank]
            result = None if own is None else compute(own)
            for source, name in enumerate(turn):
                if name is not None:
                    yield name, self.broadcast(result, source)


ALONE = Processes()


def shares(work: Mapping[str, float], processes: int) -> list[list[str]]:
    """Share pieces of work out: the largest first, each to the process that has least to do so far.

    Args:
        work: Cost of each piece by name, in any unit.
        processes: Number of processes; a single one takes the pieces as they come.

    Returns:
        The pieces of each process, in the order in which to do them.
    """
    if processes == 1:
        return [list(work)]
    queues: list[list[str]] = [[] for _ in range(processes)]
    loads = [0.0] * processes
    for name in sorted(work, key=work.__getitem__, reverse=True):
        idlest = loads.index(min(loads))
        queues[idlest].append(name)
        loads[idlest] += work[name]
    return queues


def own_device(device: str) -> str:
    """Device of this process, by the recipe's name: of several processes on one machine, each takes a GPU.

    Raises:
        ConfigError: If there are not enough GPUs, or one GPU is named for all processes.
    """
    here = own_place()
    if here.count == 1 or device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return device
    if device not in ("auto", "cuda"):
        raise ConfigError(
            f"The device {device!r} cannot serve {here.count} processes.",
            "Leave --device out, and each process takes a GPU of its own; or use --device cpu.",
        )
    if here.local_count > torch.cuda.device_count():
        raise ConfigError(
            f"torchrun has started {here.local_count} processes where there are {torch.cuda.device_count()} GPUs.",
            "Start one process for each GPU, or use --device cpu.",
        )
    return f"cuda:{here.local_rank}"


@contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the other processes that torchrun has started; without torchrun, be the only one.

    A process group that the caller has made is used as it is; it needs gloo for tensors on the CPU.

    Args:
        device: Device on which this process computes.

    Raises:
        ProcessError: If the others cannot be reached.
    """
    here = own_place()
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), device)
        return
    if here.count == 1:
        yield ALONE
        return
    on_gpu = device.type == "cuda"
    with _end_as_error(), torch.cuda.device(device) if on_gpu else nullcontext():
        try:
            with _company():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                    store=PrefixStore(f"llm_surgeon/{next(_joins)}", _store(_PATIENCE)),
                    rank=here.rank,
                    world_size=here.count,
                    timeout=_PATIENCE,
                )
            yield Processes(here.rank, here.count, device)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def say_once(message: str, say: Callable[[], None]) -> None:
    """Let one of torchrun's processes print a message that several of them may come to.

    The others wait until it is printed: torchrun ends all processes as soon as one has ended.

    Args:
        message: The message, by which the processes recognise it.
        say: Prints it.
    """
    begun, done = f"llm_surgeon/saying/{message}", f"llm_surgeon/said/{message}"
    try:
        store = _store(_STORE_PATIENCE)
        first = store.add(begun, 1) == 1
    except (RuntimeError, ValueError):
        # torchrun has ended, and its store with it; or only its environment was inherited.
        say()
        return
    with suppress(RuntimeError):
        if first:
            say()
            store.set(done, "")
        else:
            store.wait([done], _STORE_PATIENCE)


def _store(patience: timedelta) -> Any:
    """The store that torchrun keeps for its processes."""
    store, _rank, _count = next(rendezvous("env://", timeout=patience))
    return store


def _announced(part: Any) -> Any:
    return _Blank(part.shape, part.dtype, part.device.type == "cpu") if isinstance(part, Tensor) else part


@contextmanager
def _company() -> Iterator[None]:
    """Turn an error of communication into a ``ProcessError``: another process cannot be reached."""
    try:
        yield
    except RuntimeError as error:
        # The first sentence, without gloo's source lines and addresses, which differ between processes.
        reason = re.split(r"\.(?:\s|$)", re.sub(r"\s*\[[^\]]*\](:\d+)?", "", str(error)).strip(), maxsplit=1)[0]
        raise ProcessError(
            f"Another process of this run has ended, or does not answer ({reason}).", "See its own message."
        ) from error


@contextmanager
def _end_as_error() -> Iterator[None]:
    """Turn torchrun's request to end (SIGTERM), which follows the end of any process, into an error that cleans up.

    Only the main thread can receive it.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        # The clean-up after another error is not to be cut short: this process ends anyway.
        if sys.exc_info()[0] is None:
            raise ProcessError(
                "This process was asked to end: another process of this run has ended, or the run was stopped.",
                "See the other's message.",
            )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
