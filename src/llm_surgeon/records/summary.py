"""The result of a run in a few lines, as text and as a table for notebooks, and the writing of its numbers."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from llm_surgeon.records.names import distinct_names

if TYPE_CHECKING:
    from llm_surgeon.records.evaluation import Perplexity, SourcePerplexity
    from llm_surgeon.records.run import PruneReport

TIMES = "\N{MULTIPLICATION SIGN}"
ARROW = "\N{RIGHTWARDS ARROW}"


def scaled(value: float, units: str = "kMBT", gap: str = "") -> str:
    """Write a count with four digits and a letter per factor of 1,000: ``134.5M``, or ``269.1 M`` with a gap."""
    letter = ""
    for unit in units:
        # Compared after rounding to four digits, so that 999,999 is 1M and not 1000k.
        if float(f"{value:.4g}") < 1000:
            break
        value, letter = value / 1000, unit
    digits = f"{value:#.4g}" if letter else f"{value:.4g}"
    return f"{digits}{gap}{letter}"


def scaled_bytes(count: int) -> str:
    """Write a number of bytes with four digits: ``269.1 MB``."""
    return f"{scaled(count, 'kMGT', gap=' ')}B"


def perplexity_cell(perplexity: float) -> str:
    """Write a perplexity with two decimals, or as a power of ten once that would be wide."""
    return f"{perplexity:,.2f}" if perplexity < 10_000 else f"{perplexity:.2e}"


def by_source(dense: Perplexity | None, pruned: Perplexity | None) -> list[tuple[str, float | None, float | None]]:
    """Perplexities of each text, where a run was measured on several: name, of the dense and of the pruned model."""
    texts = [measured.sources if measured else () for measured in (dense, pruned)]
    names = [text.data for text in texts[0] or texts[1]]
    # Published names have no paths any more.
    short = distinct_names(names) if any(Path(name).is_absolute() for name in names) else names
    return [(name, *_both(texts, number)) for number, name in enumerate(short)]


def _both(texts: list[tuple[SourcePerplexity, ...]], number: int) -> tuple[float | None, float | None]:
    """Perplexities of the dense and of the pruned model on one text."""
    first, last = (found[number].perplexity if number < len(found) else None for found in texts)
    return first, last


def facts_of(report: PruneReport) -> list[tuple[str, str]]:
    """The facts of a run that are read first, by name; facts that were not measured are left out."""
    dense, last = report.dense_size, report.shots[-1] if report.shots else None
    size = dense if last is None else last.size
    facts = [
        ("model", report.model),
        (
            "kept",
            f"{100 * size.prunable / dense.prunable:.1f} % of the prunable weights "
            f"({scaled(dense.prunable)} {ARROW} {scaled(size.prunable)})",
        ),
        ("parameters", f"{scaled(dense.total)} {ARROW} {scaled(size.total)}"),
    ]
    if last is not None and last.perplexity is not None:
        before = f"{perplexity_cell(report.dense_perplexity.perplexity)} {ARROW} " if report.dense_perplexity else ""
        facts.append(("perplexity", f"{before}{perplexity_cell(last.perplexity.perplexity)}"))
        for name, first, final in by_source(report.dense_perplexity, last.perplexity):
            cells = [perplexity_cell(value) for value in (first, final) if value is not None]
            facts.append((f"on {name}", f" {ARROW} ".join(cells)))
    export, speed = report.export, report.speed
    if export is not None:
        files = f"{scaled_bytes(export.dense_weight_bytes)} {ARROW} {scaled_bytes(export.weight_bytes)}"
        facts.append(("weight files", files))
    if speed is not None:
        facts.append(("speed", f"prefill {speed.prefill_ratio:.2f}{TIMES}, decoding {speed.decode_ratio:.2f}{TIMES}"))
    if export is not None:
        facts.append(("export", export.path))
    return facts


def summary_text(report: PruneReport) -> str:
    """Write the facts of a run as plain text, one a line."""
    facts = facts_of(report)
    width = 1 + max(len(name) for name, _ in facts)
    return "\n".join(f"{f'{name}:':<{width}} {fact}" for name, fact in facts)


def summary_html(report: PruneReport) -> str:
    """Write the facts of a run as a small HTML table."""
    rows = "".join(
        f'<tr><th style="text-align: left">{escape(name)}</th><td style="text-align: left">{escape(fact)}</td></tr>'
        for name, fact in facts_of(report)
    )
    return f"<table><tbody>{rows}</tbody></table>"
