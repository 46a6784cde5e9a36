"""Code that all commands share: consoles, results as files, and errors as messages."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from llm_surgeon.errors import OutputError, SurgeonError
from llm_surgeon.records import Record
from llm_surgeon.system.logs import error_console, print_error
from llm_surgeon.system.torchrun import own_place

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that a checkpoint brings, if it is no export of ours.")
]

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")]
Precision = Annotated[str, typer.Option(help="Arithmetic: bfloat16 (autocast) or float32.")]
ResultFile = Annotated[Path | None, typer.Option(help="JSON file to write the results to; must not exist.")]


def command_line() -> str:
    """The command as it was typed, for the record."""
    # The bytes of an argument that the locale has no characters for are most likely UTF-8, as the record is.
    return os.fsencode(shlex.join(["llm-surgeon", *sys.argv[1:]])).decode("utf8", "replace")


def console() -> Console:
    """Console for results on standard output; shows text as it is, as names and paths may hold brackets and colons."""
    # A log file has no width of its own; the tables need 100 columns.
    return Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 100)


def write_result(out: Path, result: Record) -> None:
    """Write a record as JSON.

    Raises:
        OutputError: If the file cannot be written.
    """
    try:
        out.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf8")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.", "Give another --out.") from None


@contextmanager
def faults_reported() -> Iterator[None]:
    """Print the stack trace of an error that is not the user's, and ask for a report of it."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        versions = ", ".join(f"{package} {version(package)}" for package in ("llm-surgeon", "torch", "transformers"))
        print_error(
            "This was not foreseen, and is probably a fault of llm-surgeon.",
            f"Please report it, with all of the above, the command and the versions: {versions}, "
            f"Python {sys.version.split()[0]}.",
        )
        sys.exit(1)


class Terminated(KeyboardInterrupt):
    """A request to end (SIGTERM), which has the same effect as Ctrl-C."""


def interrupt_on_sigterm() -> None:
    """Let SIGTERM clear up and say how to go on, as Ctrl-C does, in a run of one process."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    # A process that ignores SIGTERM (trap '' TERM) is meant to go on.
    if own_place().count == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)


@contextmanager
def errors_as_messages(
    interrupted: str | Callable[[], str] = "interrupted; nothing was written",
) -> Iterator[None]:
    """Turn a user's mistake into two sentences and an exit status, without a stack trace.

    Args:
        interrupted: Message after an interrupt, or a function that makes it.
    """
    try:
        yield
    except SurgeonError as error:
        _say_once(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interrupt:
        if own_place().rank == 0:
            error_console().print(interrupted if isinstance(interrupted, str) else interrupted(), soft_wrap=True)
        number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from None


def _say_once(error: SurgeonError) -> None:
    """Print an error, in one process only if several find the same."""
    if own_place().count == 1:
        print_error(error.cause, error.remedy)
        return
    # torchrun ends all processes when one has ended. This process ignores that until it has said why it ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Imported late, see prune.
    from llm_surgeon.system.processes import say_once

    say_once(str(error), lambda: print_error(error.cause, error.remedy))
