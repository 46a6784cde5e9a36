"""Standard streams that never fail, even if the shell hands them over closed, full, unread, or for ASCII only."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from llm_surgeon.system.logs import print_error


class _Unfailing(io.RawIOBase):
    """Raw stream of standard output or error, which drops the text that cannot be written any more.

    Attributes:
        failure: Why the first write failed; None if none did.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.failure: OSError | None = None
        # An unbuffered stream (python -u) is its own raw stream.
        self._raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        # Kept, because the text stream closes its raw stream once it is garbage.
        self._stream = stream

    def write(self, data: Any, /) -> int | None:
        try:
            written: int | None = self._raw.write(data)
        except OSError as error:
            self.failure = error
            # Processes that inherit the stream shall not fail either.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._raw.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes
        return written

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        number: int = self._raw.fileno()
        return number

    def isatty(self) -> bool:
        return bool(self._raw.isatty())


@contextmanager
def standard_streams() -> Iterator[None]:
    """Keep a run from ending because standard output or error is closed, full, without a reader, or ASCII only.

    Commands print last, when all files are complete. If that text is lost, the exit status is 1, and a message says why
    unless the reader itself has gone.
    """
    _open_closed_streams()
    sys.stdout, output = _unfailing(sys.stdout, "replace")
    sys.stderr, _ = _unfailing(sys.stderr, "backslashreplace")
    try:
        yield
    finally:
        sys.stdout.flush()
        if output.failure is not None:
            if output.failure.errno != errno.EPIPE:
                print_error(
                    f"Standard output cannot be written: {output.failure.strerror}.",
                    "Files that the command has written are complete; only what it prints is lost.",
                )
            sys.exit(1)


def _open_closed_streams() -> None:
    """Open closed standard streams on the null device: else a file of the run would get the number of one."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # open() takes the lowest free number, which is that of the closed stream.
            number = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf8"))


def _unfailing(stream: TextIO, errors: str) -> tuple[TextIO, _Unfailing]:
    """A text stream that takes all characters and never fails, and its raw stream, which records the failure."""
    raw = _Unfailing(stream)
    text = io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=errors, line_buffering=True)
    return text, raw
