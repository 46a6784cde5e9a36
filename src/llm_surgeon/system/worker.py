"""Workers: processes of their own for one task each, so that their peak memory and their crashes are theirs alone.

A worker is ``python -m MODULE TASK ANSWER``, with two files of JSON. Modules that take long to import are imported
within the work, when the worker already ignores an interrupt at the terminal.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from llm_surgeon.errors import SurgeonError
from llm_surgeon.records import Failure, Record
from llm_surgeon.system.files import in_place
from llm_surgeon.system.streams import standard_streams

_STANDARD_ERROR = 2


def ask_worker(command: Callable[[Path, Path], list[str]], task: Record, saving: str) -> str | Failure:
    """Start a worker for a task and wait for its answer; a worker that ends without one is a failure, not an error.

    The worker's standard error and standard output both go to standard error here: standard output stays for results.

    Args:
        command: Makes the command of the worker from the files of task and answer, see ``module_command``.
        task: The task.
        saving: Advice to the user by which the work needs less memory, should it run out.

    Returns:
        The answer as JSON, or the failure of a worker that left none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        order, answer = Path(scratch) / "task.json", Path(scratch) / "answer.json"
        order.write_text(task.model_dump_json(), encoding="utf8")
        # The worker's standard input is the reading end, and so ends with this process, however this process ends.
        reading, writing = os.pipe()
        try:
            # An interrupt here kills the worker after a moment; the worker itself ignores the terminal's interrupt.
            done = subprocess.run(command(order, answer), stdin=reading, stdout=_STANDARD_ERROR, check=False)
        finally:
            os.close(reading)
            os.close(writing)
            # A worker that is killed in the middle of a progress bar leaves the terminal without a cursor.
            Console(stderr=True).show_cursor()
        if answer.exists():
            return answer.read_text(encoding="utf8")
    return _died(done.returncode, saving)


def module_command(module: str, order: Path, answer: Path) -> list[str]:
    """Command of a worker; ``-P`` keeps files in the working directory from being imported."""
    return [sys.executable, "-P", "-m", module, str(order), str(answer)]


def answer_worker(work: Callable[[str], Record], order: str, answer: str) -> None:
    """Run a worker: read the task, do the work, write the answer, and end this process.

    Args:
        work: Takes the task as JSON and returns the answer; raises nothing.
        order: File of the task.
        answer: File of the answer.
    """
    # The parent gets the interrupt too, and ends this process; a second stack trace would help nobody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(Path(order).parent,), daemon=True).start()
    with standard_streams():
        result = work(Path(order).read_text(encoding="utf8"))
    with in_place(Path(answer)) as path:
        path.write_text(result.model_dump_json(), encoding="utf8")
    # Not by sys.exit: torch takes a while to shut down, in which nobody would notice that the parent has ended.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent(scratch: Path) -> None:
    """End this process when its parent has ended, by a kill too, and remove the parent's scratch directory for it."""
    os.read(0, 1)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def failure_of(error: Exception) -> Failure:
    """Failure to answer with for an error; with a stack trace if the error is not a ``SurgeonError``."""
    if isinstance(error, SurgeonError):
        return Failure(cause=error.cause, remedy=error.remedy)
    last = traceback.format_exception_only(error)[-1].strip()
    return Failure(cause=last, remedy="", trace="".join(traceback.format_exception(error)))


def _died(status: int, saving: str) -> Failure:
    """Failure of a worker that left no answer, from its exit status; negative for a signal."""
    if status >= 0:
        return Failure(cause=f"The process ended with exit status {status}.", remedy="What it said is above.")
    name = signal.Signals(-status).name
    if name == "SIGKILL":
        return Failure(
            cause="The process was killed (SIGKILL), probably because memory ran out.",
            remedy=f"{saving}, or free memory, and run the command again.",
        )
    return Failure(cause=f"The process was ended by {name}.", remedy="Run the command again.")
