"""Moving tensors while others are computed with: one thread, which on a GPU has a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Transfers:
    """Moves that are made one after the other, in the order in which they were begun.

    Args:
        device: Where tensors come from and are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Its thread begins with the first move.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="transfers")
        self._stream: torch.cuda.Stream | None = None

    def begin(self, move: Callable[[], T]) -> Callable[[], T]:
        """Begin a move; returns what waits for its result, and raises what it raised, as often as it is asked.

        Args:
            move: Moves a tensor, and gives it as it is where it has come, if anybody wants it. On a GPU this is after
                all that the caller has asked of the device so far, and before all that is asked after waiting for it.
        """
        if self._device.type != "cuda":
            return self._pool.submit(move).result
        return self._begin_beside(move)

    def _begin_beside(self, move: Callable[[], T]) -> Callable[[], T]:
        """On a stream beside that of the computations."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        stream, asked = self._stream, torch.cuda.current_stream(self._device).record_event()

        def run() -> tuple[T, torch.cuda.Event]:
            with torch.cuda.stream(stream):
                stream.wait_event(asked)
                return move(), stream.record_event()

        pending = self._pool.submit(run)

        def arrived() -> T:
            moved, done = pending.result()
            here = torch.cuda.current_stream(self._device)
            here.wait_event(done)
            if isinstance(moved, Tensor) and moved.is_cuda:
                # It was allocated on the other stream, which must not use its memory again too early.
                moved.record_stream(here)
            return moved

        return arrived
