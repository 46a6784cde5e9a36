"""The directory of a run, ``OUT.run`` beside its output: a lock, the run's identity, its checkpoints and its export.

A run writes only into this directory, until the complete ``OUT`` appears and the directory is removed. All that a
killed process leaves is thus in one place, where the next process finds it: ``run.json`` and ``recipe.yaml`` (identity
and recipe of the run), checkpoints, states inside a shot, ``export`` (which becomes ``OUT``) and, when that is
complete, ``report.json``.
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
from llm_surgeon.session.marks import Marks
from llm_surgeon.system.files import PARTIAL, check_output, flush, in_place, sync, writing

logger = logging.getLogger(__name__)

LOCK, _RUN, _RECIPE, _REPORT = "lock", "run.json", "recipe.yaml", "report.json"
# Commands by the file that tells what their run is.
_KINDS = {_RUN: "prune", "recover.json": "recover"}
# Entries of a run's record by which the same command is recognised.
_IDENTITY = frozenset({"files", "recipe", "texts"})
# Upper bound of the bytes of these files.
_WORDS = 2**20
_Kind = TypeVar("_Kind", bound=Record)


class RunDirectory:
    """The directory of a run, locked for this process, see ``run_directory``.

    Attributes:
        out: Path of the export in the end.
        path: The directory.
        export: Directory that becomes ``out``.
        checkpoints: Checkpoints of the run.
        former: Identity of the run that an earlier process began here; None if nothing can be continued.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, path_of(out)
        remove_links(self.path)
        self.export, self.checkpoints = self.path / "export", Checkpoints(self.path)
        self._marks = Marks(self.path)
        self.former = self._tidied()
        self._compared: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of the files in the directory but for states inside a shot, which no plan of a disk counts."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file()) - self._marks.nbytes

    @property
    def finished(self) -> PruneReport | None:
        """Report of a run whose export is complete, in this directory or at ``out``; None if it is not complete."""
        there = self.export.is_dir() or (self.out / _REPORT).is_file()
        return _read(self.path / _REPORT, PruneReport) if there else None

    def expect(self, now: Mapping[str, Any]) -> None:
        """Check that the run's identity is the former one; a former run without a complete shot is discarded instead.

        Args:
            now: Some entries of the ``RunRecord``, by name.

        Raises:
            OutputError: If the identity differs, with the differences.
        """
        if self.former is None:
            return
        self._compared |= now.keys()
        changed = [line for name in now for line in _changes(name, getattr(self.former, name), now[name])]
        if not changed:
            return
        if not self._worth_keeping:
            self._forget()
            return
        self._compared.clear()
        raise OutputError(
            f"The run in {self.path} was begun with something else: {'; '.join(changed)}.",
            f"Restore that to continue it, or remove {self.path}, or give another --out.",
        )

    def refuse_former(self) -> None:
        """Refuse to replace a run that can be continued; a former run without a complete shot is discarded.

        Raises:
            OutputError: If there is a run that can be continued.
        """
        if self._worth_keeping:
            raise OutputError(
                f"{self.path} holds a run that `llm-surgeon prune` or prune_checkpoint can continue.",
                "Remove it, or give another out.",
            )
        self._forget()

    def begin(self, record: RunRecord, config: PruneConfig) -> None:
        """Write the identity of the run and its recipe.

        Args:
            record: Identity that a continued run must have.
            config: The recipe, with the sparsity for its target.
        """
        if self.former is not None:
            for line in differences(self.former.circumstances, record.circumstances):
                logger.warning("%s since the run was begun: the last bits of the weights may differ", line)
        with writing(self.path, _WORDS):
            for name, text in ((_RUN, record.model_dump_json(indent=2) + "\n"), (_RECIPE, config.to_yaml())):
                with in_place(self.path / name) as path:
                    path.write_text(text, encoding="utf8")

    def finish(self, report: PruneReport) -> PruneReport:
        """Move the complete export to ``out``.

        Args:
            report: Report of the whole run.

        Raises:
            OutputError: If something has appeared at ``out`` in the meantime.
        """
        with writing(self.path, _WORDS):
            if self.finished is None:
                flush(self.export)
                with in_place(self.path / _REPORT) as path:
                    path.write_text(report.model_dump_json(), encoding="utf8")
            self._put_in_place()
        return report

    def _put_in_place(self) -> None:
        # Without the directory, an earlier process has moved it already.
        if self.export.is_dir():
            check_output(self.out)
            os.replace(self.export, self.out)  # replaces an empty directory too
            sync(self.out.parent)

    def leave(self) -> None:
        """Keep the files with which the same command continues, and say so; without any, remove the directory."""
        if not self._worth_keeping:
            self.remove()
            return
        if self.finished is None:
            with contextlib.suppress(OSError):
                self._remove_unfinished_export()
        # An error before the comparison, or in it, may be that of another command.
        if self.former is not None and not self._compared >= _IDENTITY:
            return
        shots = self.checkpoints.shots()
        where = f"continues after shot {shots[0]}" if shots else "continues"
        if self._marks.there:
            where = f"continues inside shot {shots[0] + 1 if shots else 1}"
        logger.warning("the same command %s (%s has what it needs)", where, self.path)

    def remove(self) -> None:
        """Remove the directory, the lock last."""
        with contextlib.suppress(OSError):
            self._empty()
            (self.path / LOCK).unlink()
            self.path.rmdir()

    def _forget(self) -> None:
        self._empty()
        self.former = None

    @property
    def _worth_keeping(self) -> bool:
        if self.checkpoints.shots() or self._marks.there:
            return True
        described = (self.path / _RUN).exists()
        return described and (self.finished is not None or any(_shot_exports(self.export)))

    def _tidied(self) -> RunRecord | None:
        """Remove unfinished files of a killed process, and return the identity of its run."""
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
        """Remove all files but the lock. The report goes last: while it is there, only this removal is left to do."""
        entries = [path for path in self.path.iterdir() if path.name != LOCK]
        for path in sorted(entries, key=lambda path: path.name == _REPORT):
            _remove(path)


@contextlib.contextmanager
def run_directory(out: Path) -> Iterator[RunDirectory]:
    """Make or open the directory of the run with the output ``out``, and lock it until the block ends.

    The directory is removed if the block ends without an error. Otherwise the files stay with which the same command
    continues.

    Raises:
        OutputError: If ``out`` cannot be used, another process works on it, or ``OUT.run`` is no run directory, or one
            of another version of this package.
    """
    out = Path(os.path.abspath(out))
    with locked(out, _RUN):
        with writing(path_of(out), _WORDS):
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
def locked(out: Path, identity: str) -> Iterator[None]:
    """Make and lock the directory of a run with the output ``out``.

    Args:
        out: The output.
        identity: Name of the file that tells what the run is. Runs of another kind are left alone.

    Raises:
        OutputError: If the directory cannot be used, or another process works on it.
    """
    path = path_of(out)
    if path.is_symlink() or (path / LOCK).is_symlink():
        raise OutputError(f"{path}, where the run is to keep its checkpoints, is a link.", "Remove the link.")
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in path.iterdir()}
        if names and LOCK not in names:
            raise OutputError(
                f"{path}, where the run is to keep its checkpoints, is no directory of a run.",
                "Rename it, or give another --out.",
            )
        other = next((command for name, command in _KINDS.items() if name != identity and name in names), None)
        if other is not None:
            raise OutputError(
                f"{path} holds what `llm-surgeon {other}` needs to go on.",
                f"Let that end, remove {path}, or give another --out.",
            )
        lock = FileLock(path / LOCK)
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


def path_of(out: Path) -> Path:
    """Directory of the run with the output ``out``."""
    return out.with_name(f"{out.name}.run")


def _shot_exports(export: Path) -> Iterator[Path]:
    """Directories of the complete exports of single shots."""
    for path in export.iterdir() if export.is_dir() else ():
        if re.fullmatch(r"shot-\d+", path.name):
            yield path


# Options that say where tensors wait, and nothing about the result: a run goes on with others, after a full disk say.
_PLACES = ("scratch", "scratch_space")


def _changes(name: str, before: Any, now: Any) -> list[str]:
    """Changes of one entry of the ``RunRecord``, in words."""
    if isinstance(before, dict):
        before, now = (
            {key: value for key, value in entries.items() if key not in _PLACES} for entries in (before, now)
        )
        # A record of an older version lacks later options; the run had their defaults.
        defaults = PruneConfig.from_mapping({}).resolved() if name == "recipe" else {}
        return differences({key: defaults[key] for key in now if key in defaults} | before, now)
    if name == "texts":
        return [] if before == now else ["the calibration or the evaluation text has changed"]
    return differences({name: before}, {name: now})


def _read(path: Path, kind: type[_Kind]) -> _Kind | None:
    """Read a record; None if there is none, or it is damaged."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        if path.exists():
            logger.warning("%s is damaged, and is not used: %s", path, str(error).splitlines()[0])
        return None


def remove_links(directory: Path) -> None:
    """Remove links in a directory and below. A run makes no links, and would write to or empty their targets."""
    for path in directory.iterdir():
        if path.is_symlink():
            logger.warning("%s is a link that no run has made, and is removed", path)
            path.unlink()
        elif path.is_dir():
            remove_links(path)


def _remove(path: Path) -> None:
    # Of a link only the link itself is removed: its target does not belong to the run.
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
