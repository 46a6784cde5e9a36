"""Processes of a comparison, one for each cell and one for the dense model; see ``llm_surgeon.system.worker``.

This module imports no torch before the work begins.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import CellMeasures, DenseRecord, Failure, Record
from llm_surgeon.system.allocator import keep_freed_memory
from llm_surgeon.system.worker import answer_worker, ask_worker, failure_of, module_command


class CellOrder(Record):
    """Task of the process.

    Attributes:
        model: A local directory, a hub id, or ``demo``.
        recipe: Recipe of the cell; for the dense model, of any cell.
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


class CellAnswer(Record):
    """Answer of the process: the dense model's record, the measures of a cell, or the failure."""

    dense: DenseRecord | None = None
    measures: CellMeasures | None = None
    failure: Failure | None = None


def work_in_process(task: CellOrder) -> CellAnswer:
    """Do the work in a fresh process; a process that ends without an answer is a failure, not an error."""
    answer = ask_worker(command, task, "Lower batch_size or samples")
    return CellAnswer(failure=answer) if isinstance(answer, Failure) else CellAnswer.model_validate_json(answer)


def command(order: Path, answer: Path) -> list[str]:
    """Command of the process, with the files of its task and answer."""
    return module_command("llm_surgeon.comparison.cell_process", order, answer)


def work(task: CellOrder) -> CellAnswer:
    """Do the work in this process; every error becomes an answer."""
    try:
        return _work(task)
    except Exception as error:
        return CellAnswer(failure=failure_of(error))


def _work(task: CellOrder) -> CellAnswer:
    from llm_surgeon.comparison.cell import measure_cell, measure_dense
    from llm_surgeon.system.logs import log_to_stderr, quiet_transformers
    from llm_surgeon.system.progress import RichProgress, SilentProgress

    quiet_transformers()
    progress = RichProgress(log_to_stderr()) if task.show else SilentProgress()
    given = task.model, PruneConfig.from_mapping(task.recipe), Path(task.reference), task.texts, progress
    return CellAnswer(dense=measure_dense(*given)) if task.dense else CellAnswer(measures=measure_cell(*given))


def main(order: str, answer: str) -> None:
    """Entry point of the process."""
    keep_freed_memory()
    answer_worker(lambda task: work(CellOrder.model_validate_json(task)), order, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
