"""Marks: states inside a shot that a run leaves on disk now and then, so that a later process goes on from there.

A mark is a file of tensors, with its words in the header, and a file with the checksum of the first in the form of
``sha256sum``. A file without a matching checksum is no mark. Marks are a convenience: where the disk has no room beside
what the run needs in any case, there are none.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_surgeon.records import Record
from llm_surgeon.system.files import in_place, says_full
from llm_surgeon.system.processes import ALONE, Processes
from llm_surgeon.system.tensor_file import TensorFile, write_tensors

logger = logging.getLogger(__name__)

Words = TypeVar("Words", bound=Record)
# Least number of seconds between two marks, and least ratio of that to the time that writing a mark takes.
OFTEN, WORTH = 60.0, 20.0
# Name of the mark that the others build on: without it they are of no use.
REMOVALS = "removals"
_WORDS = "words"
_PREFIX = "inside-"


@dataclass(frozen=True)
class Mark(Generic[Words]):
    """A mark that is whole.

    Attributes:
        path: File of the tensors.
        words: What it says beside the tensors.
    """

    path: Path
    words: Words

    def tensors(self, kind: str) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor whose name begins with a kind and a slash, with the rest of its name, on the CPU."""
        tensors = TensorFile(self.path)
        for name in tensors:
            if name.startswith(f"{kind}/"):
                yield name.removeprefix(f"{kind}/"), tensors[name]


@dataclass
class Marks:
    """Marks of the shot under way, in the directory of a run.

    Attributes:
        directory: The directory; None keeps no marks.
        reserve: Bytes of the disk that the run needs for other files.
        processes: Who shares the run; the first writes for all, and all read.
    """

    directory: Path | None = None
    reserve: int = 0
    processes: Processes = ALONE
    _since: float = field(default_factory=lambda: time.monotonic(), repr=False)
    _pause: float = field(default=0.0, repr=False)
    _began: float | None = field(default=None, repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all marks."""
        if self.directory is None:
            return 0
        return sum(path.stat().st_size for path in self.directory.glob(f"{_PREFIX}*"))

    @property
    def there(self) -> bool:
        """Whether a mark is there that is newer than any checkpoint of a shot; it may be damaged."""
        return self.directory is not None and inside_a_shot(self.directory)

    def due(self) -> bool:
        """Whether so much has been done since the last mark that one on top of the removals is worth its time."""
        if self.directory is None:
            return False
        base = self._tensors(REMOVALS).with_suffix(".sha256")
        now, pause = time.monotonic(), max(OFTEN, self._pause)
        due = self.processes.from_first(lambda: now - self._since >= pause and base.exists())
        self._began = now if due else None
        return due

    def write(self, name: str, tensors: Callable[[], Mapping[str, Tensor]], words: Record) -> None:
        """Write a mark in place of the former one of this name.

        Args:
            name: Name of the mark.
            tensors: Function that gives the tensors of the mark; called in the first process only.
            words: What the mark says beside them.
        """
        if self.directory is not None:
            # Of several marks that are written one after the other, the time of all counts.
            began = time.monotonic() if self._began is None else self._began
            self.processes.from_first(lambda: self._write(name, tensors(), words))
            self._since = time.monotonic()
            self._pause = WORTH * (self._since - began)

    def read(self, name: str, kind: type[Words]) -> Mark[Words] | None:
        """The mark of a name, in all processes; None if there is none, or it is damaged."""
        if self.directory is None:
            return None
        path = self._tensors(name)
        words = self.processes.from_first(lambda: self._read(path, kind))
        return None if words is None else Mark(path, words)

    def clear(self) -> None:
        """Remove all marks: the shot is over, or none of them is of use."""
        self._since, self._began = time.monotonic(), None
        if self.directory is not None and self.processes.first:
            # The checksums go first: without them, the other files are no marks.
            for ending in ("sha256", "safetensors"):
                for path in self.directory.glob(f"{_PREFIX}*.{ending}"):
                    path.unlink()

    def _tensors(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{_PREFIX}{name}.safetensors"

    def _write(self, name: str, tensors: Mapping[str, Tensor], words: Record) -> None:
        path = self._tensors(name)
        needed = sum(tensor.nbytes for tensor in tensors.values())
        if self._room() < needed:
            logger.warning(
                "no state inside the shot is kept: %s has no room for %d MiB more", path.parent, needed >> 20
            )
            return
        try:
            with in_place(path) as partial:
                write_tensors(partial, tensors, {_WORDS: words.model_dump_json()})
                # Until the file has its name, the checksum of the former file counts as well.
                sums = path.with_suffix(".sha256")
                former = sums.read_text(encoding="utf8").splitlines(keepends=True) if sums.exists() else []
                with in_place(sums) as of_sums:
                    of_sums.write_text("".join([*former[-1:], f"{_digest(partial)}  {path.name}\n"]), encoding="utf8")
        except OSError as error:
            if not says_full(error):
                raise
            logger.warning("no state inside the shot is kept: the disk of %s is full", path.parent)

    def _room(self) -> int:
        """Free bytes of the disk beside what the run needs in any case."""
        assert self.directory is not None
        return shutil.disk_usage(self.directory).free - self.reserve

    def _read(self, path: Path, kind: type[Words]) -> Words | None:
        sums = path.with_suffix(".sha256")
        if not (sums.exists() and path.exists()):
            return None
        try:
            if f"{_digest(path)}  {path.name}" in sums.read_text(encoding="utf8").splitlines():
                with safe_open(path, framework="pt") as file:
                    return kind.model_validate_json(file.metadata()[_WORDS])
        # A ValidationError is a ValueError; a file of another version may have no words.
        except (OSError, ValueError, SafetensorError, KeyError, TypeError):
            pass
        logger.warning("the state inside the shot is damaged, or of another version (%s), and is not used", path.name)
        return None


def inside_a_shot(directory: Path) -> bool:
    """Whether the newest state in the directory of a run is one inside a shot; checkpoints of shots are ``shot-*``."""
    marks, shots = (
        max((path.stat().st_mtime_ns for path in directory.glob(f"{prefix}*.sha256")), default=0)
        for prefix in (_PREFIX, "shot-")
    )
    return marks > shots


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
