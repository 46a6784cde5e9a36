"""A stopwatch for the parts of a phase: code names the part that it does, and whoever measures the phase is told.

On a GPU work goes on after a call has returned, so there the device itself notes when a part begins and ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Part = Literal["factor sums", "decomposition", "transfers"]
Elapsed = Callable[[], float]

# A stack rather than a context variable: on a GPU gradients are computed in another thread.
_listeners: list[Callable[[Part, Elapsed], None]] = []


@contextmanager
def listening(listener: Callable[[Part, Elapsed], None]) -> Iterator[None]:
    """Tell ``listener`` of every part that ends in the block, with a function that gives its seconds."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def timed(part: Part) -> Iterator[None]:
    """Measure a block as a part of the work; parts do not contain one another."""
    if not _listeners:
        yield
        return
    elapsed = _started()
    yield
    result = elapsed()
    for listener in _listeners:
        listener(part, result)


def _started() -> Callable[[], Elapsed]:
    """Begin to measure; what is returned ends it and gives a function for the seconds."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()

        def stop_on_gpu() -> Elapsed:
            end.record()

            def seconds() -> float:
                end.synchronize()
                return float(begin.elapsed_time(end)) / 1000

            return seconds

        return stop_on_gpu
    start = time.perf_counter()

    def stop() -> Elapsed:
        taken = time.perf_counter() - start
        return lambda: taken

    return stop
