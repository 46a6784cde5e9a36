"""Output files and directories: checks before a run, named errors, and files that appear only when complete."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from llm_surgeon.errors import DiskSpaceError, OutputError

# Errors of a full disk, of a used up quota, and of a file larger than a process may write.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Suffix of a file or directory that is not complete.
PARTIAL = ".partial"


def check_output(out: Path) -> None:
    """Make sure that the export can go to ``out``.

    Raises:
        OutputError: If ``out`` is a file, is a directory that is not empty, or cannot be written.
    """
    _check_possible(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "is not empty" if out.is_dir() else "is a file"
        raise OutputError(f"The output directory {out} {kind}.", "Give a new directory, or remove this one first.")
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"No directory can be made in {parent}.", "Give an output directory that you may write.")


def check_result_file(out: Path) -> None:
    """Make sure that a file of results can be written, and overwrites none.

    Raises:
        OutputError: If the file exists, or its directory does not exist or cannot be written.
    """
    _check_possible(out)
    if out.exists():
        raise OutputError(f"The file {out} exists.", "Name another one, or remove this one first.")
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"No file can be made in {parent}.", "Name a file in a directory that you may write.")


def _check_possible(out: Path) -> None:
    """Make sure that a file system can have a file of this name.

    Raises:
        OutputError: If the name is too long, or holds a NUL.
    """
    try:
        # Bytes that the locale could not decode are half characters here, which files of JSON cannot hold.
        str(out).encode("utf8")
        out.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"{str(out)[:100]!r} cannot be an output: {reason}.", "Give another --out.") from None


def check_disk_space(out: Path, needed: int) -> None:
    """Make sure that ``needed`` bytes fit where ``out`` will be.

    Raises:
        DiskSpaceError: If they do not fit.
    """
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise DiskSpaceError(
            f"Exports and checkpoints need about {_mebibytes(needed)} at {out}, and {_mebibytes(free)} are free.",
            "Free some space, or give an output directory on another disk.",
        )


def _existing_parent(out: Path) -> Path:
    return next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())


@contextlib.contextmanager
def writing(path: Path, needed: int) -> Iterator[None]:
    """Turn errors of writing within a block into errors with cause and remedy.

    Args:
        path: The file or directory that is written.
        needed: Approximate bytes that are written.

    Raises:
        DiskSpaceError: If the disk or a quota is full; says how much is needed.
        OutputError: If the file cannot be written for another reason.
    """
    try:
        yield
    # safetensors has an error of its own.
    except (OSError, SafetensorError) as error:
        if not says_full(error):
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise OutputError(f"{path} cannot be written: {reason}.", "Give an --out that you may write.") from None
        free = shutil.disk_usage(_existing_parent(path)).free
        raise DiskSpaceError(
            f"The disk is full, or a quota used up: {path} needs about {_mebibytes(needed)}, and "
            f"{_mebibytes(free)} of its disk are free.",
            f"Free {_mebibytes(needed)} there.",
        ) from None


def says_full(error: object) -> bool:
    """Tell whether an error, or another process's message, is of a full disk, a quota or a limit of file size."""
    if getattr(error, "errno", None) in _FULL:
        return True
    # Errors of Rust and of other processes have the number in their text only.
    return any(f"(os error {number})" in str(error) or f"[Errno {number}]" in str(error) for number in _FULL)


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


@contextlib.contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """Write a file beside ``path`` that becomes ``path`` when the block ends well: nobody ever reads half a file.

    This holds after a power failure too: the file is on the disk before it gets its name.

    Args:
        path: The file in the end.

    Yields:
        The path to write to.
    """
    beside = path.with_name(f"{path.name}{PARTIAL}")
    # A link that somebody has put there would be written through.
    beside.unlink(missing_ok=True)
    try:
        yield beside
        sync(beside)
        os.replace(beside, path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def readable_as_others(directory: Path) -> None:
    """Give weight files the mode that new files get here: safetensors makes them readable for their owner alone."""
    probe = directory / f"mode{PARTIAL}"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in directory.glob("*.safetensors"):
        path.chmod(mode)


def flush(directory: Path) -> None:
    """Wait until a directory with all its files is on the disk."""
    for path in (*directory.rglob("*"), directory):
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot sync a directory
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
