"""Seconds and peak memory of the phases of a shot, and the seconds of the parts that its work is made of."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
        self._under_way: tuple[str, float] | None = None
        self._before: dict[str, float] = {}
        self._profile_before: dict[str, float] = {}

    def take_over(self, stages: Sequence[StageRecord], profile: Mapping[str, float]) -> None:
        """Count time and memory of an earlier process, before anything is measured here."""
        self._before = {stage.name: stage.seconds for stage in stages}
        self.seconds, self._profile_before = dict(self._before), dict(profile)
        self.peaks = {stage.name: stage.peak for stage in stages}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block as a phase of this name."""
        reset_peak(self._device)
        start = time.perf_counter()
        self._under_way = name, start
        with listening(lambda part, elapsed: self._parts.append((name, part, elapsed))):
            yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._under_way = None
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peaks[name] = max(self.peaks.get(name, 0), peak_bytes(self._device))

    def _so_far(self) -> dict[str, float]:
        """Seconds by phase, with those of the phase under way."""
        if self._under_way is None:
            return self.seconds
        name, start = self._under_way
        return self.seconds | {name: self.seconds.get(name, 0.0) + time.perf_counter() - start}

    def records(self, told: Iterable[StageRecord] = ()) -> tuple[StageRecord, ...]:
        """Records of all phases so far, in the order in which they first ran.

        Args:
            told: Records of some of them, whose figures are taken over.
        """
        known = {record.name: record for record in told}
        return tuple(
            known.get(name, StageRecord(name=name, seconds=0.0)).model_copy(
                update={"seconds": seconds, "peak": self.peaks.get(name, 0)}
            )
            for name, seconds in self._so_far().items()
        )

    def profile(self) -> dict[str, float]:
        """Seconds by kind of work: the parts that phases consist of, and the rest of each phase under its own name."""
        result: dict[str, float] = {}
        rest = {name: seconds - self._before.get(name, 0.0) for name, seconds in self._so_far().items()}
        for phase, part, elapsed in self._parts:
            seconds = elapsed()
            result[part] = result.get(part, 0.0) + seconds
            rest[phase] -= seconds
        names = {"curvature": "model pass", "selection": "costs and selection"}
        result = {names.get(phase, phase): max(0.0, seconds) for phase, seconds in rest.items()} | result
        before = self._profile_before
        return before | {name: seconds + before.get(name, 0.0) for name, seconds in result.items()}
