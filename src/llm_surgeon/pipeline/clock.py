"""Seconds and peak memory of the phases of a shot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from llm_surgeon.evaluation.memory import peak_bytes, reset_peak


class Clock:
    """Seconds and peak bytes by phase; a phase that comes again adds to its time.

    Attributes:
        seconds: By phase.
        peaks: By phase, bytes of the device if it is a GPU, else resident in the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block."""
        reset_peak(self._device)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peaks[name] = max(self.peaks.get(name, 0), peak_bytes(self._device))
