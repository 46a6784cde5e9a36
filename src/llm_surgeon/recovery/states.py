"""States of a training in its directory, from which it goes on: each process keeps its part of the tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_surgeon.system.files import in_place, writing
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.tensor_file import TensorFile, write_tensors

STATE, BEST = "state", "best"


class States:
    """Files of the states, by the number of steps that had been taken.

    A state is complete when every process has written its file. Until then, the last one stays.

    Args:
        directory: Directory of the files, which exists.
        processes: The processes, each with a part of every tensor.
    """

    def __init__(self, directory: Path, processes: Processes) -> None:
        self._directory, self._processes = directory, processes

    def newest(self) -> int | None:
        """Number of steps of the newest complete state; None if there is none."""
        own = sorted(self._steps(STATE), reverse=True)
        for step in self._processes.broadcast(own, 0):
            whole = step in own and self._readable(step)
            if self._processes.total(float(whole))[0] == self._processes.count:
                return int(step)
        return None

    def read(self, kind: str, step: int) -> tuple[TensorFile, dict[str, str]]:
        """Tensors of this process's part by name, and the words beside them."""
        path = self._path(kind, step)
        with safe_open(path, framework="pt") as file:
            return TensorFile(path), dict(file.metadata() or {})

    def write(self, kind: str, step: int, tensors: Mapping[str, Tensor], words: Mapping[str, str]) -> None:
        """Write the part of this process.

        Raises:
            DiskSpaceError: If the disk is full.
        """
        path = self._path(kind, step)
        with writing(path, sum(tensor.nbytes for tensor in tensors.values())), in_place(path) as beside:
            write_tensors(beside, tensors, words)

    def tidy(self, state: int, best: int | None) -> None:
        """Remove all files but those of two steps, when every process has written its own."""
        self._processes.total(0.0)
        for kind, kept in ((STATE, state), (BEST, best)):
            for step in self._steps(kind):
                if step != kept:
                    self._path(kind, step).unlink()

    def _readable(self, step: int) -> bool:
        try:
            self.read(STATE, step)
        except (OSError, SafetensorError):
            return False
        return True

    def _steps(self, kind: str) -> list[int]:
        return list(_numbers(self._directory, rf"{kind}-(\d+)-{self._processes.rank}\.safetensors"))

    def _path(self, kind: str, step: int) -> Path:
        return self._directory / f"{kind}-{step}-{self._processes.rank}.safetensors"


def _numbers(directory: Path, pattern: str) -> Iterator[int]:
    for path in directory.iterdir():
        if found := re.fullmatch(pattern, path.name):
            yield int(found[1])
