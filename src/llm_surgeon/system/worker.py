"""Work in a process of its own: peak memory is its alone, and a crash costs it alone.

The process is ``python -m MODULE TASK ANSWER``, two files of JSON. What takes long to import is imported in the work,
when an interrupt at the terminal is no longer the process's business.
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
    """Have the work done in a fresh process and wait for it; whatever becomes of the process is an answer.

    Its standard error is passed on, and so is what it prints: standard output stays for results.

    Args:
        command: Gives the command of the process, see ``module_command``.
        task: What is to be done.
        saving: What the user can do to need less memory, should it run out.

    Returns:
        The answer as JSON, or what is known of a process that left none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        order, answer = Path(scratch) / "task.json", Path(scratch) / "answer.json"
        order.write_text(task.model_dump_json(), encoding="utf8")
        # The reading end is the process's standard input, which ends with this process, however that ends.
        reading, writing = os.pipe()
        try:
            # An interrupt here kills the process after a moment; it ignores the one that the terminal sends it.
            done = subprocess.run(command(order, answer), stdin=reading, stdout=_STANDARD_ERROR, check=False)
        finally:
            os.close(reading)
            os.close(writing)
            # Who is killed in the middle of a progress bar leaves the terminal without a cursor.
            Console(stderr=True).show_cursor()
        if answer.exists():
            return answer.read_text(encoding="utf8")
    return _died(done.returncode, saving)


def module_command(module: str, order: Path, answer: Path) -> list[str]:
    """The command of the process; ``-P`` keeps files in the working directory from being imported."""
    return [sys.executable, "-P", "-m", module, str(order), str(answer)]


def answer_worker(work: Callable[[str], Record], order: str, answer: str) -> None:
    """The whole of the process, which ends here: ``work`` is given the task as JSON, and raises nothing."""
    # The parent gets the interrupt too, and ends this process; two stack traces would help nobody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(Path(order).parent,), daemon=True).start()
    with standard_streams():
        result = work(Path(order).read_text(encoding="utf8"))
    with in_place(Path(answer)) as path:
        path.write_text(result.model_dump_json(), encoding="utf8")
    # Not the ordinary way: taking torch apart takes a while, in which nobody would notice that the parent has ended.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent(scratch: Path) -> None:
    """End this process when the one that asked has ended, be it by a kill, and remove what that would have removed."""
    os.read(0, 1)
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def failure_of(error: Exception) -> Failure:
    """An error as an answer; with its stack trace if it was not foreseen."""
    if isinstance(error, SurgeonError):
        return Failure(cause=error.cause, remedy=error.remedy)
    last = traceback.format_exception_only(error)[-1].strip()
    return Failure(cause=last, remedy="", trace="".join(traceback.format_exception(error)))


def _died(status: int, saving: str) -> Failure:
    """What is known of a process that left no answer."""
    if status >= 0:
        return Failure(cause=f"The process ended with exit status {status}.", remedy="What it said is above.")
    name = signal.Signals(-status).name
    if name == "SIGKILL":
        return Failure(
            cause="The process was killed (SIGKILL), probably because memory ran out.",
            remedy=f"{saving}, or free memory, and run the command again.",
        )
    return Failure(cause=f"The process was ended by {name}.", remedy="Run the command again.")
