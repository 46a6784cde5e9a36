"""A comparison of methods as tables: one set of rows, drawn for the terminal and written as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llm_surgeon.recipe.sources import as_several
from llm_surgeon.records import Cell, CellMeasures, Comparison, Setting
from llm_surgeon.report.card import model_name
from llm_surgeon.report.table import UNKNOWN, Row, escape, markdown_rows, perplexity_cell, perplexity_note, scaled_bytes

HEADINGS = ("method", "perplexity", "KL (nats/token)", "sparsity reached", "seconds", "peak memory")


@dataclass(frozen=True)
class Panel:
    """Rows of the cells under one setting, the dense model first; ``best`` is the row of the lowest perplexity."""

    setting: Setting
    rows: list[Row]
    best: int | None


def panels(comparison: Comparison) -> list[Panel]:
    """Panels of all settings, with numbers as text in the order of ``HEADINGS``."""
    return [_panel(comparison, setting, cells) for setting, cells in cells_by_setting(comparison)]


def cells_by_setting(comparison: Comparison) -> list[tuple[Setting, list[Cell]]]:
    """Settings with their cells, both in the order of the record."""
    settings = dict.fromkeys(cell.setting for cell in comparison.cells)
    return [(setting, [cell for cell in comparison.cells if cell.setting == setting]) for setting in settings]


def comparison_tables(comparison: Comparison) -> RenderableType:
    """Draw the comparison for a terminal of 100 columns."""
    tables = [_table(comparison, panel) for panel in panels(comparison)]
    notes = [Text(note, style="dim") for note in footnotes(comparison)]
    return Group(*tables, *[Text(problem) for problem in problems(comparison)], *notes)


def comparison_markdown(comparison: Comparison) -> str:
    """Write the comparison as Markdown: a table per setting, missing cells with their causes, and notes."""
    parts = [f"# {escape(model_name(comparison.model))}: methods compared"]
    for panel in panels(comparison):
        rows = [_bold(row) if number == panel.best else row for number, row in enumerate(panel.rows)]
        parts += [f"## {escape(panel.setting.label)}", "\n".join(markdown_rows(HEADINGS, rows))]
    parts += [_list(lines) for lines in (problems(comparison), footnotes(comparison)) if lines]
    return "\n\n".join(parts) + "\n"


def problems(comparison: Comparison) -> list[str]:
    """Sentences on the cells without numbers, with the cause."""
    return [_problem(cell) for cell in comparison.cells if cell.failure is not None]


def footnotes(comparison: Comparison) -> list[str]:
    """Notes on the meaning of the columns, and on the texts and the way of measuring."""
    shared, calibration = comparison.shared, ", ".join(as_several(comparison.shared["calibration"]))
    sequences = f"{shared['samples']:,} sequences of {shared['seq_len']:,} tokens"
    if shared["windows_per_sample"] > 1:
        sequences += f" in {shared['windows_per_sample']} windows each"
    return [
        perplexity_note(comparison.dense.perplexity),
        f"Calibration: {calibration}, {sequences}, seed {shared['seed']}; the same tokens for all.",
        "KL: divergence from the dense model's predictions, KL(dense || pruned), mean over the tokens scored. Sparsity "
        "reached: counted in the pruned weights.",
        "Seconds: pruning alone. Peak memory: while pruning, in a process of its own (of the GPU, on a GPU).",
        f"Versions: {', '.join(_versions(comparison))}. {comparison.date}.",
    ]


def _panel(comparison: Comparison, setting: Setting, cells: list[Cell]) -> Panel:
    dense = ("dense", perplexity_cell(comparison.dense.perplexity.perplexity), "0", "0.0 %", UNKNOWN, UNKNOWN)
    # Rows of cells count from 1, as the dense model has row 0.
    values = {n: cell.measures.perplexity.perplexity for n, cell in enumerate(cells, start=1) if cell.measures}
    return Panel(setting, [dense, *map(_row, cells)], min(values, key=values.__getitem__, default=None))


def _row(cell: Cell) -> Row:
    if cell.measures is None:
        missing = "failed" if cell.status == "failed" else UNKNOWN
        return (cell.variant, missing, *[UNKNOWN] * (len(HEADINGS) - 2))
    return (cell.variant, *_numbers(cell.measures))


def _numbers(measures: CellMeasures) -> Row:
    return (
        perplexity_cell(measures.perplexity.perplexity),
        f"{measures.divergence:.4g}",
        f"{100 * measures.sparsity:.1f} %",
        f"{measures.seconds:,.1f}",
        scaled_bytes(measures.peak),
    )


def _problem(cell: Cell) -> str:
    what = "failed" if cell.status == "failed" else "not possible"
    reason = [] if cell.failure is None else [cell.failure.cause, cell.failure.remedy]
    if cell.failure is not None and cell.failure.trace:
        reason = [f"{cell.failure.cause}.", f"The stack trace is in cells/{cell.name}.json."]
    return f"{cell.variant}, {cell.setting.label}, {what}: {' '.join(filter(None, reason))}"


def _versions(comparison: Comparison) -> list[str]:
    """Versions of the packages in all measures; a package that changed in between has several."""
    measured = [cell.measures.versions for cell in comparison.cells if cell.measures]
    found: dict[str, list[str]] = {}
    for versions in [comparison.dense.versions, *measured]:
        for package, version in versions.items():
            found[package] = list(dict.fromkeys([*found.get(package, []), version]))
    return [f"{package} {' and '.join(some)}" for package, some in found.items()]


def _table(comparison: Comparison, panel: Panel) -> Table:
    title = Text(f"{model_name(comparison.model)}: {panel.setting.label}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading.replace(" ", "\n", 1), justify="right" if number else "left")
    for number, row in enumerate(panel.rows):
        # As text: names of variants are not markup.
        table.add_row(*map(Text, row), style="bold" if number == panel.best else None)
    return table


def _bold(row: Row) -> Row:
    return (row[0], f"**{row[1]}**", *row[2:])


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)
