"""Seconds and peak memory of the phases of a shot, and the seconds of the parts that its work is made of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from llm_surgeon.records import StageRecord
from llm_surgeon.stopwatch import Elapsed, Part, listening
from llm_surgeon.system.memory import peak_bytes, reset_peak


class Clock:
    """Seconds and peak bytes by phase; a phase that comes again adds to its time.

    Args:
        device: Device whose work and memory are measured.

    Attributes:
        seconds: Seconds by phase.
        peaks: Peak bytes by phase: of the device if it is a GPU, else resident in the process.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._device = device
        self._parts: list[tuple[str, Part, Elapsed]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block as a phase of this name."""
        reset_peak(self._device)
        start = time.perf_counter()
        with listening(lambda part, elapsed: self._parts.append((name, part, elapsed))):
            yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peaks[name] = max(self.peaks.get(name, 0), peak_bytes(self._device))

    def records(self, told: Iterable[StageRecord] = ()) -> tuple[StageRecord, ...]:
        """Records of all phases in the order in which they first ran.

        Args:
            told: Records of some of them, whose figures are taken over.
        """
        known = {record.name: record for record in told}
        return tuple(
            known.get(name, StageRecord(name=name, seconds=0.0)).model_copy(
                update={"seconds": seconds, "peak": self.peaks[name]}
            )
            for name, seconds in self.seconds.items()
        )

    def profile(self) -> dict[str, float]:
        """Seconds by kind of work: the parts that phases consist of, and the rest of each phase under its own name."""
        result: dict[str, float] = {}
        rest = dict(self.seconds)
        for phase, part, elapsed in self._parts:
            seconds = elapsed()
            result[part] = result.get(part, 0.0) + seconds
            rest[phase] -= seconds
        names = {"curvature": "model pass", "selection": "costs and selection"}
        return {names.get(phase, phase): max(0.0, seconds) for phase, seconds in rest.items()} | result
