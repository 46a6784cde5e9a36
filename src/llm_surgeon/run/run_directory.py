"""The directory of a run, ``OUT.run`` beside its output: who works on it, what it works on, how far it has come.

All that a run writes is in there until ``OUT`` appears, complete, and the directory goes. What a killed process leaves
is thus in one place, where the next one finds it. There are ``run.json`` and ``recipe.yaml`` (what the run works on),
checkpoints, ``export`` (what becomes ``OUT``) and, once that is complete, ``report.json``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from llm_surgeon.errors import OutputError
from llm_surgeon.pruning.checkpoint import Checkpoints
from llm_surgeon.recipe.config import PruneConfig, differences
from llm_surgeon.records import PruneReport, Record, RunRecord
from llm_surgeon.system.files import PARTIAL, check_output, flush, in_place, sync, writing

logger = logging.getLogger(__name__)

_LOCK, _RUN, _RECIPE, _REPORT = "lock", "run.json", "recipe.yaml", "report.json"
# Bytes of these, generously.
_WORDS = 2**20
_Kind = TypeVar("_Kind", bound=Record)


class RunDirectory:
    """The directory of a run on which nobody else works, see ``run_directory``.

    Attributes:
        out: Where the export goes in the end.
        path: The directory.
        export: What becomes ``out``.
        checkpoints: Of the run.
        former: What an earlier process worked on here, if there is anything to go on with.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, _path_of(out)
        _remove_links(self.path)
        self.export, self.checkpoints = self.path / "export", Checkpoints(self.path)
        self.former = self._tidied()

    @property
    def nbytes(self) -> int:
        """Bytes of the files that are there already."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    @property
    def finished(self) -> PruneReport | None:
        """The report of a run whose export is complete, in here or at its place already."""
        there = self.export.is_dir() or (self.out / _REPORT).is_file()
        return _read(self.path / _REPORT, PruneReport) if there else None

    def expect(self, now: Mapping[str, Any]) -> None:
        """Make sure that what the run works on is what it was; without a shot to lose, what was there is forgotten.

        Args:
            now: Some entries of the ``RunRecord``.

        Raises:
            OutputError: If it is not; says what has changed.
        """
        if self.former is None:
            return
        changed = [line for name in now for line in _changes(name, getattr(self.former, name), now[name])]
        if not changed:
            return
        if not self._worth_keeping:
            self._forget()
            return
        raise OutputError(
            f"The run in {self.path} was begun with something else: {'; '.join(changed)}.",
            f"Restore that to continue it, or remove {self.path}, or give another --out.",
        )

    def refuse_former(self) -> None:
        """Make sure that no run is lost by one that keeps no checkpoints; without a shot to lose, it is forgotten.

        Raises:
            OutputError: If one would be.
        """
        if self._worth_keeping:
            raise OutputError(
                f"{self.path} holds a run that `llm-surgeon prune` or prune_checkpoint can continue.",
                "Remove it, or give another out.",
            )
        self._forget()

    def begin(self, record: RunRecord, config: PruneConfig) -> None:
        """Write down what the run works on.

        Args:
            record: What has to be found again.
            config: The recipe with the sparsity that its target came to.
        """
        if self.former is not None:
            for line in differences(self.former.circumstances, record.circumstances):
                logger.warning("%s since the run was begun: the last bits of the weights may differ", line)
        with writing(self.path, _WORDS):
            for name, text in ((_RUN, record.model_dump_json(indent=2) + "\n"), (_RECIPE, config.to_yaml())):
                with in_place(self.path / name) as path:
                    path.write_text(text, encoding="utf8")

    def finish(self, report: PruneReport) -> PruneReport:
        """Let the complete export appear at ``out``.

        Args:
            report: Of the whole run.

        Raises:
            OutputError: If something appeared there meanwhile.
        """
        with writing(self.path, _WORDS):
            if self.finished is None:
                flush(self.export)
                with in_place(self.path / _REPORT) as path:
                    path.write_text(report.model_dump_json(), encoding="utf8")
            self._put_in_place()
        return report

    def _put_in_place(self) -> None:
        # If it is not there, an earlier process was ended after this.
        if self.export.is_dir():
            check_output(self.out)
            os.replace(self.export, self.out)  # replaces an empty directory too
            sync(self.out.parent)

    def leave(self) -> None:
        """Keep what the same command can go on with, and say so; or nothing."""
        if not self._worth_keeping:
            self.remove()
            return
        if self.finished is None:
            with contextlib.suppress(OSError):
                self._remove_unfinished_export()
        shots = self.checkpoints.shots()
        where = f"continues after shot {shots[0]}" if shots else "continues"
        logger.warning("the same command %s (%s has what it needs)", where, self.path)

    def remove(self) -> None:
        """Remove the directory, the lock last."""
        with contextlib.suppress(OSError):
            self._empty()
            (self.path / _LOCK).unlink()
            self.path.rmdir()

    def _forget(self) -> None:
        self._empty()
        self.former = None

    @property
    def _worth_keeping(self) -> bool:
        if self.checkpoints.shots():
            return True
        described = (self.path / _RUN).exists()
        return described and (self.finished is not None or any(_shot_exports(self.export)))

    def _tidied(self) -> RunRecord | None:
        """Remove what a killed process has left half-done; returns what it worked on."""
        newest = self.checkpoints.newest()
        record = _read(self.path / _RUN, RunRecord) if newest is None else newest.run
        if record is None:
            self._empty()
            return None
        self.checkpoints.tidy()
        for path in self.path.glob(f"*{PARTIAL}"):
            _remove(path)
        if self.finished is None:
            (self.path / _REPORT).unlink(missing_ok=True)
            self._remove_unfinished_export()
        return record

    def _remove_unfinished_export(self) -> None:
        finished = set(_shot_exports(self.export))
        for path in self.export.iterdir() if self.export.is_dir() else ():
            if path not in finished:
                _remove(path)

    def _empty(self) -> None:
        """Remove all but the lock; the report last, as long as it is there all that is left to do is this."""
        entries = [path for path in self.path.iterdir() if path.name != _LOCK]
        for path in sorted(entries, key=lambda path: path.name == _REPORT):
            _remove(path)


@contextlib.contextmanager
def run_directory(out: Path) -> Iterator[RunDirectory]:
    """The directory of the run whose output ``out`` is, made if need be; this process's alone until the block ends.

    It goes when the block ends well. If not, it stays as far as the same command can go on with it.

    Raises:
        OutputError: If ``out`` cannot be used, another process works on it, or its run directory is none, or was left
            by another version of this package.
    """
    out = Path(os.path.abspath(out))
    with _locked(out):
        with writing(_path_of(out), _WORDS):
            run = RunDirectory(out)
        try:
            if run.finished is None:
                check_output(out)
            yield run
        except BaseException:
            run.leave()
            raise
        run.remove()


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    path = _path_of(out)
    if path.is_symlink() or (path / _LOCK).is_symlink():
        raise OutputError(f"{path}, where the run is to keep its checkpoints, is a link.", "Remove the link.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        if names and _LOCK not in names:
            raise OutputError(
                f"{path}, where the run is to keep its checkpoints, is no directory of a run.",
                "Rename it, or give another --out.",
            )
        lock = FileLock(path / _LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"Another process works on {out}.", "Wait until it has ended, or give another --out."
        ) from None
    except OSError as error:
        raise OutputError(f"{path} cannot be used: {error.strerror}.", "Give another --out.") from None
    try:
        yield
    finally:
        lock.release()


def _path_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.run")


def _shot_exports(export: Path) -> Iterator[Path]:
    """The exports of single shots that are complete."""
    for path in export.iterdir() if export.is_dir() else ():
        if re.fullmatch(r"shot-\d+", path.name):
            yield path


def _changes(name: str, before: Any, now: Any) -> list[str]:
    """What has changed of one entry of the ``RunRecord``, in words."""
    if isinstance(before, dict):
        # An option that did not exist then had its default.
        defaults = PruneConfig.from_mapping({}).resolved() if name == "recipe" else {}
        return differences({key: defaults[key] for key in now if key in defaults} | before, now)
    if name == "texts":
        return [] if before == now else ["the calibration or the evaluation text has changed"]
    return differences({name: before}, {name: now})


def _read(path: Path, kind: type[_Kind]) -> _Kind | None:
    """A record, or None if there is none, or a damaged one."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        if path.exists():
            logger.warning("%s is damaged, and is not used: %s", path, str(error).splitlines()[0])
        return None


def _remove_links(directory: Path) -> None:
    """Remove links in a directory and below: a run makes none, and would write or empty what they lead to."""
    for path in directory.iterdir():
        if path.is_symlink():
            logger.warning("%s is a link that no run has made, and is removed", path)
            path.unlink()
        elif path.is_dir():
            _remove_links(path)


def _remove(path: Path) -> None:
    # A link goes itself; what it leads to is not the run's.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
