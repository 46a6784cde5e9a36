"""Transfers of tensors beside the computation: one thread, which on a GPU has a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Transfers:
    """Moves of tensors, made one after the other in the order in which they were begun.

    Args:
        device: Device that computes, from which and to which tensors are moved.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # The thread of the pool begins with the first move.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="transfers")
        self._stream: torch.cuda.Stream | None = None

    def begin(self, move: Callable[[], T]) -> Callable[[], T]:
        """Begin a move.

        Args:
            move: Moves a tensor and returns the moved one, or None if nobody wants it. On a GPU the move comes after
                all work that the caller has queued so far, and before all work that is queued after waiting for it.

        Returns:
            A function that waits for the move and returns its result. It may be called several times. It raises the
            error of the move, if there was one.
        """
        if self._device.type != "cuda":
            return self._pool.submit(move).result
        return self._begin_beside(move)

    def _begin_beside(self, move: Callable[[], T]) -> Callable[[], T]:
        """Begin a move on a stream beside that of the computations; see ``begin``."""
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
                # The other stream allocated the tensor, and must not use its memory again too early.
                moved.record_stream(here)
            return moved

        return arrived
