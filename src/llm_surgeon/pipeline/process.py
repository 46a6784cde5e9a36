"""A process of its own for each piece of a comparison's work: peak memory is its alone, and a crash costs it alone.

The process is ``python -m llm_surgeon.pipeline.process TASK ANSWER``, two files of JSON. What takes long to import is
imported in the work, when an interrupt at the terminal is no longer this process's business.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from llm_surgeon.config import PruneConfig
from llm_surgeon.errors import SurgeonError
from llm_surgeon.pipeline.folder import in_place
from llm_surgeon.records import CellMeasures, DenseRecord, Failure, Record
from llm_surgeon.runtime import keep_freed_memory

_STANDARD_ERROR = 2


class Task(Record):
    """What the process is to do.

    Attributes:
        model: A local directory, a hub id, or ``demo``.
        recipe: Of the cell; for the dense model, of any cell.
        reference: File of the dense model's hidden states, written for the dense model and read for the others.
        texts: Digest that the tokens must have; None if there is none yet.
        dense: Whether to measure the dense model instead of pruning.
        show: Whether to show progress on standard error.
    """

    model: str
    recipe: dict[str, Any]
    reference: str
    texts: str | None = None
    dense: bool = False
    show: bool = False


class Answer(Record):
    """What came of it: one of the three."""

    dense: DenseRecord | None = None
    measures: CellMeasures | None = None
    failure: Failure | None = None


def work_apart(task: Task) -> Answer:
    """Do the work in a fresh process and wait for it; whatever becomes of the process is an answer.

    Its standard error is passed on, and so is what it prints: standard output stays for results.
    """
    with tempfile.TemporaryDirectory() as scratch:
        order, answer = Path(scratch) / "task.json", Path(scratch) / "answer.json"
        order.write_text(task.model_dump_json(), encoding="utf8")
        try:
            # An interrupt here kills the process after a moment; it ignores the one that the terminal sends it.
            done = subprocess.run(command(order, answer), stdin=subprocess.DEVNULL, stdout=_STANDARD_ERROR, check=False)
        finally:
            # Who is killed in the middle of a progress bar leaves the terminal without a cursor.
            Console(stderr=True).show_cursor()
        if answer.exists():
            return Answer.model_validate_json(answer.read_text(encoding="utf8"))
    return Answer(failure=_died(done.returncode))


def command(order: Path, answer: Path) -> list[str]:
    """The command of the process; ``-P`` keeps files in the working directory from being imported."""
    return [sys.executable, "-P", "-m", "llm_surgeon.pipeline.process", str(order), str(answer)]


def work(task: Task) -> Answer:
    """Do the work in this process; every error becomes an answer."""
    try:
        return _work(task)
    except SurgeonError as error:
        return Answer(failure=Failure(cause=error.cause, remedy=error.remedy))
    except Exception as error:
        last = traceback.format_exception_only(error)[-1].strip()
        return Answer(failure=Failure(cause=last, remedy="", trace=traceback.format_exc()))


def _work(task: Task) -> Answer:
    from llm_surgeon.pipeline.cell import measure_cell, measure_dense
    from llm_surgeon.report.log import log_to_stderr, quiet_transformers
    from llm_surgeon.report.progress import RichProgress, SilentProgress

    quiet_transformers()
    progress = RichProgress(log_to_stderr()) if task.show else SilentProgress()
    given = task.model, PruneConfig.from_mapping(task.recipe), Path(task.reference), task.texts, progress
    return Answer(dense=measure_dense(*given)) if task.dense else Answer(measures=measure_cell(*given))


def _died(status: int) -> Failure:
    """What is known of a process that left no answer."""
    if status >= 0:
        return Failure(cause=f"The process ended with exit status {status}.", remedy="What it said is above.")
    name = signal.Signals(-status).name
    if name == "SIGKILL":
        return Failure(
            cause="The process was killed (SIGKILL), probably because memory ran out.",
            remedy="Lower batch_size or samples, or free memory, and run the command again.",
        )
    return Failure(cause=f"The process was ended by {name}.", remedy="Run the command again.")


def main(order: str, answer: str) -> None:
    """Entry point of the process."""
    # The parent gets the interrupt too, and ends this process; two stack traces would help nobody.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_memory()
    result = work(Task.model_validate_json(Path(order).read_text(encoding="utf8")))
    with in_place(Path(answer)) as path:
        path.write_text(result.model_dump_json(), encoding="utf8")


if __name__ == "__main__":
    main(*sys.argv[1:])
