"""The directory of a recovery, ``OUT.run``: a lock, the identity of the recovery, and the states of its training."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from pydantic import ValidationError

from llm_surgeon.errors import NonFiniteError, OutputError, RecoveryError
from llm_surgeon.planning.sizes import STATE_BYTES
from llm_surgeon.records import RecoveryIdentity, RecoveryRecord
from llm_surgeon.recovery.opening import Work, bytes_of
from llm_surgeon.recovery.states import STATE
from llm_surgeon.run.run_directory import LOCK, locked, path_of, remove_links
from llm_surgeon.system.files import check_disk_space, check_output, in_place, writing
from llm_surgeon.system.processes import Processes

logger = logging.getLogger(__name__)

RECORD, IDENTITY = "recovery.json", "recover.json"


@contextlib.contextmanager
def recovery_directory(out: Path, processes: Processes) -> Iterator[Path]:
    """Make or open the directory of the recovery with the output ``out``, locked by the first process.

    It is removed when the block ends, after an error too unless a state in it is worth keeping.

    Raises:
        OutputError: If ``out`` or the directory cannot be used.
    """
    path = path_of(out)
    with ExitStack() as stack:
        if processes.first:
            stack.enter_context(locked(out, IDENTITY))
        # On another machine there is no directory yet.
        processes.total(0.0)
        with writing(path, 0):
            path.mkdir(parents=True, exist_ok=True)
            if processes.first:
                remove_links(path)
        try:
            if processes.first and not _is_only_moved(out, path):
                check_output(out)
            yield path
        except (RecoveryError, NonFiniteError):
            # The same command would come to the same end.
            _remove(path)
            raise
        except BaseException as error:
            if not any(path.glob(f"{STATE}-*.safetensors")):
                _remove(path)
            elif processes.first and not isinstance(error, OutputError):
                logger.warning("the same command goes on from its last state (%s has what it needs)", path)
            raise
        processes.total(0.0)
        _remove(path)


def begin(work: Work, out: Path, directory: Path) -> RecoveryRecord | None:
    """Compare a recovery with the one that was begun here, or begin it; returns the record of a complete one.

    Raises:
        OutputError: If another was begun here.
        DiskSpaceError: If the disk is too full.
    """
    now, path = work.identity(), directory / IDENTITY
    former = _read(path)
    if former is not None and former != now and any(directory.glob(f"{STATE}-*.safetensors")):
        changed = [name for name in RecoveryIdentity.model_fields if getattr(former, name) != getattr(now, name)]
        raise OutputError(
            f"The recovery in {directory} was begun with something else ({', '.join(changed)}).",
            f"Restore that to continue it, or remove {directory}, or give another --out.",
        )
    if former == now and (out / RECORD).is_file():
        # The process ended between the move of the result and the removal of the directory.
        return RecoveryRecord.model_validate_json((out / RECORD).read_bytes())
    if former != now:
        if path.exists() and former is None:
            logger.warning("%s is damaged or of another version: the recovery begins anew", path)
        _empty(directory)
        check_disk_space(directory, _disk_bytes(work))
        with writing(path, 2**20), in_place(path) as beside:
            beside.write_text(now.model_dump_json(indent=2) + "\n", encoding="utf8")
    return None


def _is_only_moved(out: Path, directory: Path) -> bool:
    """Whether what is at ``out`` may be the result of the recovery in a directory."""
    return (out / RECORD).is_file() and (directory / IDENTITY).is_file()


def _disk_bytes(work: Work) -> int:
    """Bytes of the states and the best weights, and of the result."""
    result = bytes_of(work.source)
    return result if work.config.adapters else STATE_BYTES * work.parameters + result


def _read(path: Path) -> RecoveryIdentity | None:
    try:
        return RecoveryIdentity.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _remove(directory: Path) -> None:
    """Remove the directory: the identity after all that belongs to it, and the lock last."""
    with contextlib.suppress(OSError):
        _empty(directory)
        for name in (IDENTITY, LOCK):
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in (IDENTITY, LOCK):
            path.unlink()
