"""The run of a comparison: each cell in a process of its own, on the same tokens, kept as soon as it is done.

This module needs no torch: the work is done in the processes.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_surgeon.comparison.cell_process import CellOrder, work_in_process
from llm_surgeon.comparison.directory import ComparisonDirectory
from llm_surgeon.comparison.variants import SHARED, Options, PlannedCell, plan
from llm_surgeon.errors import ComparisonError
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import Cell, Comparison, DenseRecord, Failure, Setting
from llm_surgeon.report.comparison_plot import comparison_png
from llm_surgeon.report.comparison_table import comparison_markdown
from llm_surgeon.system.files import in_place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Common:
    """Settings that all processes of a comparison share."""

    model: str
    directory: ComparisonDirectory
    show: bool
    command: str | None


def compare(
    model: str | Path,
    out: str | Path,
    variants: Mapping[str, Options],
    settings: Sequence[Setting],
    common: Options | None = None,
    *,
    show_progress: bool = False,
    command: str | None = None,
) -> Comparison:
    """Run every variant under every setting on identical tokens, and write one table of them to a directory.

    Finished cells that the directory holds are not run again; failed ones are. Finished cells of earlier calls stay in
    the table. A cell that fails is put on record, and the others go on.

    Args:
        model: A local directory, a hub id, or ``demo``; a dense model.
        out: Directory of the comparison; new, empty, or of an earlier call with the same model, texts and arithmetic.
        variants: Recipe options by name of the variant, ``{"wide": {"method": "surgeon", "max_correlations": 64}}``.
        settings: Structures that are removed, and the sparsity of each.
        common: Recipe options of all cells: calibration, evaluation, shots and so on.
        show_progress: Whether the processes show their progress on standard error.
        command: The command line, for the record.

    Returns:
        The comparison, as in ``comparison.json``.

    Raises:
        ConfigError: If a variant or a setting is possible in no cell, or a comparison cannot take an option.
        OutputError: If ``out`` cannot be used.
        ComparisonError: If ``out`` holds results of other recipes, or the dense model cannot be measured.
    """
    model, out = str(model), Path(out)
    cells = plan(variants, settings, common or {})
    recipe = next(cell.config.resolved() for cell in cells if cell.config is not None)
    shared = {name: recipe[name] for name in SHARED}
    work = _Common(model, ComparisonDirectory(out), show_progress, command)
    former = work.directory.former(model, shared)
    results = work.directory.finished(model, cells)
    due = [(cell, cell.config) for cell in cells if cell.config is not None and cell.name not in results]
    dense = former.dense if former else None
    if dense is None or (due and not work.directory.reference.exists()):
        dense = _measure_dense(work, recipe, dense)
    comparison = Comparison(model=model, shared=shared, dense=dense, cells=(), date="", command=command)
    for cell in cells:
        if cell.refusal is not None:
            failure = Failure(cause=cell.refusal.cause, remedy=cell.refusal.remedy)
            results[cell.name] = _kept(work, cell, status="impossible", failure=failure)
    comparison = _publish(work, comparison, cells, results)
    for number, (cell, config) in enumerate(due, start=1):
        logger.info("cell %d of %d: %s, %s", number, len(due), cell.variant, cell.setting.label)
        results[cell.name] = _run(work, cell, config, dense)
        comparison = _publish(work, comparison, cells, results)
    if all(results[cell.name].status == "finished" for cell in cells if cell.config is not None):
        work.directory.drop_reference()
    return comparison


def _measure_dense(work: _Common, recipe: Options, former: DenseRecord | None) -> DenseRecord:
    """Measure the dense model; if that fails, the directory is left as it was.

    A comparison that is continued needs the hidden states again. It keeps the former record, which its cells were
    compared with.
    """
    made = not work.directory.path.exists()
    work.directory.path.mkdir(parents=True, exist_ok=True)
    measured = None
    try:
        answer = work_in_process(_task(work, recipe, former, dense=True))
        measured = answer.dense
    finally:
        if measured is None:
            work.directory.drop_reference()
            if made:
                with contextlib.suppress(OSError):
                    work.directory.path.rmdir()
    if measured is None:
        raise _dense_error(answer.failure)
    return former or measured


def _dense_error(failure: Failure | None) -> ComparisonError:
    if failure is None or failure.trace:
        what = failure.cause if failure else "the process gave no answer"
        return ComparisonError(
            f"The dense model cannot be measured: {what}.", "`llm-surgeon eval` shows where it fails."
        )
    return ComparisonError(failure.cause, failure.remedy)


def _task(work: _Common, recipe: Options, dense_record: DenseRecord | None, *, dense: bool = False) -> CellOrder:
    return CellOrder(
        model=work.model,
        recipe=dict(recipe),
        reference=str(work.directory.reference.absolute()),
        texts=dense_record.texts if dense_record else None,
        dense=dense,
        show=work.show,
    )


def _run(work: _Common, planned: PlannedCell, config: PruneConfig, dense: DenseRecord) -> Cell:
    """Run one cell and keep its record."""
    recipe = config.resolved()
    answer = work_in_process(_task(work, recipe, dense))
    if answer.failure is not None:
        logger.error("%s, %s failed: %s", planned.variant, planned.setting.label, answer.failure.cause)
        return _kept(work, planned, recipe=recipe, status="failed", failure=answer.failure)
    return _kept(work, planned, recipe=recipe, status="finished", measures=answer.measures)


def _kept(work: _Common, planned: PlannedCell, **outcome: Any) -> Cell:
    """Write the record of a cell and return it."""
    cell = Cell(name=planned.name, variant=planned.variant, setting=planned.setting, model=work.model, **outcome)
    work.directory.write_cell(cell)
    return cell


def _publish(
    work: _Common, comparison: Comparison, cells: Sequence[PlannedCell], results: Mapping[str, Cell]
) -> Comparison:
    """Write record, table and picture of the results so far, so that a long comparison can be read while it runs."""
    names = [cell.name for cell in cells]
    shown = [results[name] for name in names if name in results] + work.directory.finished_before(names)
    comparison = comparison.model_copy(update={"cells": tuple(shown), "date": f"{datetime.date.today()}"})
    work.directory.write_record(comparison)
    with in_place(work.directory.table) as path:
        path.write_text(comparison_markdown(comparison), encoding="utf8")
    with in_place(work.directory.picture) as path:
        comparison_png(comparison, path)
    return comparison
