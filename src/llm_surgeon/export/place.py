"""Where the results of a run go: what is checked before, and a directory that appears only when it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llm_surgeon.errors import DiskSpaceError, OutputError


def check_output(out: Path) -> None:
    """Make sure that the export can go to ``out``.

    Raises:
        OutputError: If it is a file, a directory that is not empty, or cannot be written.
    """
    _check_possible(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "is not empty" if out.is_dir() else "is a file"
        raise OutputError(f"The output directory {out} {kind}.", "Give a new directory, or remove this one first.")
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"No directory can be made in {parent}.", "Give an output directory that you may write.")


def check_result_file(out: Path) -> None:
    """Make sure that a file of results can be written, and that none is lost by it.

    Raises:
        OutputError: If there is something of that name, or its directory does not exist or cannot be written.
    """
    _check_possible(out)
    if out.exists():
        raise OutputError(f"The file {out} exists.", "Name another one, or remove this one first.")
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"No file can be made in {parent}.", "Name a file in a directory that you may write.")


def _check_possible(out: Path) -> None:
    """Make sure that a file system can have such a name.

    Raises:
        OutputError: If it is too long, or holds a NUL.
    """
    try:
        out.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{str(out)[:100]!r} cannot be an output: {reason}.", "Give another --out.") from None


def check_disk_space(out: Path, needed: int) -> None:
    """Make sure that ``needed`` bytes fit where ``out`` will be.

    Raises:
        DiskSpaceError: If they do not.
    """
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise DiskSpaceError(
            f"The export needs about {needed / 2**20:.0f} MiB at {out}, and {free / 2**20:.0f} MiB are free.",
            "Free some space, or give an output directory on another disk.",
        )


def _existing_parent(out: Path) -> Path:
    return next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())


@contextlib.contextmanager
def directory_in_place(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: If the directory cannot be made or moved.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out.parent} cannot be written: {error.strerror}.", "Give another --out.") from None
    try:
        yield beside
        # mkdtemp makes it private; the result should have the usual rights.
        beside.chmod(0o777 & ~_umask())
        try:
            os.replace(beside, out)  # replaces an empty directory too
        except OSError as error:
            raise OutputError(f"{out} appeared meanwhile: {error.strerror}.", "Give another --out.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that becomes ``path`` when the block ends well: nobody ever reads half a file."""
    beside = path.with_name(f"{path.name}.partial")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
