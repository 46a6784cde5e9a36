"""Summary of a run as tables: shot by shot for the terminal, dense and pruned for the model card."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from llm_surgeon.records import Perplexity, PruneReport, Size, SpeedComparison

# "as" makes these names of this module, so that other modules can import them.
from llm_surgeon.records.summary import ARROW
from llm_surgeon.records.summary import TIMES as TIMES
from llm_surgeon.records.summary import by_source as by_source
from llm_surgeon.records.summary import perplexity_cell as perplexity_cell
from llm_surgeon.records.summary import scaled as scaled
from llm_surgeon.records.summary import scaled_bytes as scaled_bytes

HEADINGS = (
    "state",
    "size kept",
    "prunable weights",
    "all parameters",
    "bytes on disk",
    "perplexity",
    "prefill tokens/s",
    "decode tokens/s",
)
UNKNOWN = "\N{EN DASH}"

Row = tuple[str, ...]


def summary_table(report: PruneReport) -> Table:
    """Draw the run for a terminal of 100 columns: a row for each state, and notes on the way of measuring below."""
    caption = Text("\n".join([*footnotes(report), *_by_source(report)]))
    table = Table(
        title=Text(f"{report.model} ({report.family})"),
        caption=caption,
        title_justify="left",
        caption_justify="left",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
    )
    for number, heading in enumerate(HEADINGS):
        # A heading of two short lines leaves more width for the numbers.
        table.add_column(heading.replace(" ", "\n", 1), justify="right" if number else "left")
    for row in table_rows(report):
        table.add_row(*row)
    return table


def _by_source(report: PruneReport) -> list[str]:
    """Sentence on the perplexity of each text, where a run was measured on several."""
    found = by_source(report.dense_perplexity, report.shots[-1].perplexity if report.shots else None)
    texts = [
        f"{name} {f' {ARROW} '.join(perplexity_cell(value) for value in (first, last) if value is not None)}"
        for name, first, last in found
    ]
    return [f"Perplexity by text: {'; '.join(texts)}."] if texts else []


def markdown_rows(headings: Row, rows: Sequence[Row]) -> list[str]:
    """Write a table in Markdown, line by line: the first column to the left, numbers to the right."""
    alignment = ("---", *("---:" for _ in headings[1:]))
    return ["| " + " | ".join(row) + " |" for row in (headings, alignment, *rows)]


def table_rows(report: PruneReport) -> list[Row]:
    """Rows of cells as text, in the order of ``HEADINGS``: the dense model first, then the model after each shot.

    Bytes on disk and speed are known for the dense and the final model only.
    """
    export, speed = report.export, report.speed
    rows = [
        _row(
            "dense",
            report.dense_size,
            report.dense_size,
            None if export is None else export.dense_weight_bytes,
            report.dense_perplexity,
            (UNKNOWN, UNKNOWN) if speed is None else (f"{speed.dense.prefill:,.0f}", f"{speed.dense.decode:,.1f}"),
        )
    ]
    for shot in report.shots:
        final = shot is report.shots[-1]
        rows.append(
            _row(
                f"shot {shot.shot}",
                shot.size,
                report.dense_size,
                export.weight_bytes if final and export is not None else None,
                shot.perplexity,
                _pruned_speed(speed) if final and speed is not None else (UNKNOWN, UNKNOWN),
            )
        )
    return rows


def dense_and_pruned(report: PruneReport) -> list[Row]:
    """Rows of the dense model beside the pruned one, a measure in each row: name, dense, pruned, and their ratio.

    Measures without a number are left out.
    """
    dense, pruned = report.dense_size, report.shots[-1].size if report.shots else report.dense_size
    rows: list[Row] = [
        ("prunable weights", scaled(dense.prunable), scaled(pruned.prunable), _share(pruned.prunable, dense.prunable)),
        ("all parameters", scaled(dense.total), scaled(pruned.total), _share(pruned.total, dense.total)),
    ]
    export, speed = report.export, report.speed
    if export is not None:
        files = export.dense_weight_bytes, export.weight_bytes
        rows.append(("bytes on disk", scaled_bytes(files[0]), scaled_bytes(files[1]), _share(files[1], files[0])))
    measured = report.dense_perplexity, report.shots[-1].perplexity if report.shots else None
    first, last = (None if perplexity is None else perplexity.perplexity for perplexity in measured)
    if first is not None or last is not None:
        cells = [UNKNOWN if value is None else perplexity_cell(value) for value in (first, last)]
        rows.append(("perplexity", cells[0], cells[1], _times(first, last)))
    for name, first, last in by_source(*measured):
        cells = [UNKNOWN if value is None else perplexity_cell(value) for value in (first, last)]
        rows.append((f"perplexity on {name}", cells[0], cells[1], _times(first, last)))
    if speed is not None:
        before, after = speed.dense, speed.pruned
        prefill, decode = f"{speed.prefill_ratio:.2f}{TIMES}", f"{speed.decode_ratio:.2f}{TIMES}"
        rows.append(("prefill tokens/s", f"{before.prefill:,.0f}", f"{after.prefill:,.0f}", prefill))
        rows.append(("decode tokens/s", f"{before.decode:,.1f}", f"{after.decode:,.1f}", decode))
    return rows


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else UNKNOWN


def _times(before: float | None, after: float | None) -> str:
    if not before or after is None or not math.isfinite(after / before):
        return UNKNOWN
    ratio = after / before
    return f"{ratio:.3g}{TIMES}" if ratio < 1000 else f"{ratio:.2e}{TIMES}"


def footnotes(report: PruneReport) -> list[str]:
    """Notes on the meaning of the columns and the way of measuring, a sentence or two in each."""
    notes = [
        "Size kept is the share of the prunable weights; embeddings and lm_head are not pruned and not in the "
        "prunable count.",
        _pruned_layers(report),
    ]
    if not report.smaller:
        notes.append("Removed weights are stored as zeros: neither the files nor the time per token shrink.")
    measured = [report.dense_perplexity, *(shot.perplexity for shot in report.shots)]
    # All states are measured alike, which makes one note. If they were not, the reader would see several.
    notes += dict.fromkeys(perplexity_note(perplexity) for perplexity in measured if perplexity is not None)
    if report.speed is not None:
        notes.append(_speed_note(report.speed))
    return notes


def _row(
    state: str, size: Size, dense: Size, weight_bytes: int | None, perplexity: Perplexity | None, speed: tuple[str, str]
) -> Row:
    return (
        state,
        f"{100 * size.prunable / dense.prunable:.1f} %",
        scaled(size.prunable),
        scaled(size.total),
        UNKNOWN if weight_bytes is None else scaled_bytes(weight_bytes),
        UNKNOWN if perplexity is None else perplexity_cell(perplexity.perplexity),
        *speed,
    )


def _pruned_speed(speed: SpeedComparison) -> tuple[str, str]:
    return (
        f"{speed.pruned.prefill:,.0f} ({speed.prefill_ratio:.2f}{TIMES})",
        f"{speed.pruned.decode:,.1f} ({speed.decode_ratio:.2f}{TIMES})",
    )


def _pruned_layers(report: PruneReport) -> str:
    kinds = list(dict.fromkeys(layer.kind for layer in report.layers))
    blocks = {layer.block for layer in report.layers}
    patterns = [f"'{pattern}'" for pattern in report.config.get("ignore", ()) if pattern != "lm_head"]
    left_out = f" Left alone by request: {', '.join(patterns)}." if patterns else ""
    return f"Pruned: {len(report.layers)} linear layers in {len(blocks)} blocks ({', '.join(kinds)}).{left_out}"


def perplexity_note(perplexity: Perplexity) -> str:
    """Note on the text of a perplexity and the way of measuring."""
    begun = " each begun with the token that begins a text," if perplexity.bos else ""
    return (
        f"Perplexity: {perplexity.data}; windows of {perplexity.window:,} tokens,{begun} stride {perplexity.stride:,}, "
        f"{perplexity.tokens:,} tokens scored, {perplexity.precision} arithmetic."
    )


def _speed_note(speed: SpeedComparison) -> str:
    dense, pruned = speed.dense, speed.pruned
    dtypes = " and ".join(dict.fromkeys((dense.dtype, pruned.dtype)))
    return (
        f"Speed: {dense.device}, {dtypes}, batch {dense.batch}; prefill of {dense.prompt:,} tokens, then "
        f"{dense.generated:,} decoded with the cache. Medians of {dense.repeats} alternating pairs; {TIMES} is the "
        "median of the pairs' ratios, pruned to dense."
    )


def escape(text: str) -> str:
    """Escape text for Markdown, such as names of data and patterns of layers."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", text)


def fenced(language: str, text: str) -> str:
    """Block of code in Markdown."""
    # The fence has to be longer than any in the text, which would end the block.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"
