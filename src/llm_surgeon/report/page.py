"""The page of a run: its whole report in one HTML file that needs no network and no scripts."""

from __future__ import annotations

from html import escape

from llm_surgeon.records import PruneReport
from llm_surgeon.report.card import model_name, title_name
from llm_surgeon.report.loading import loading_lines, using_lines, why_so
from llm_surgeon.report.markup import code, said
from llm_surgeon.report.page_machine import (
    export_section,
    memory_section,
    origin_section,
    plan_section,
    speed_section,
    time_section,
)
from llm_surgeon.report.page_result import (
    costs_section,
    curves_section,
    layers_section,
    result_section,
    shots_section,
)
from llm_surgeon.report.plots import kept_percent
from llm_surgeon.report.recovery_page import recovery_section
from llm_surgeon.report.sample_table import samples_section
from llm_surgeon.report.style import CSS
from llm_surgeon.report.table import TIMES, perplexity_cell, scaled_bytes


def report_page(report: PruneReport) -> str:
    """Write the page of a run as one HTML document that loads nothing; missing measures are left out or named."""
    title = f"{escape(title_name(report))}, pruned"
    sections = (
        ("result", "Result", result_section(report)),
        ("shots", "Shots", shots_section(report)),
        ("curves", "Perplexity and loss", curves_section(report)),
        ("recovery", "Recovery", recovery_section(report.recovery)),
        ("texts", "Texts", samples_section(report.samples)),
        ("layers", "Layers", layers_section(report.layers)),
        ("costs", "Costs", costs_section(report.shots)),
        ("time", "Time", time_section(report.shots)),
        ("memory", "Memory", memory_section(report.shots, report.memory)),
        ("plan", "Plan", plan_section(report)),
        ("export", "Export check", export_section(report.export)),
        ("speed", "Speed", speed_section(report.speed)),
        ("origin", "Origin", origin_section(report)),
    )
    links = " ".join(f'<a href="#{name}">{heading}</a>' for name, heading, _ in sections)
    body = "\n".join(
        f'<section id="{name}">\n<h2>{heading}</h2>\n{content}\n</section>' for name, heading, content in sections
    )
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{CSS}</style>
</head>
<body>
<main>
<header>
<p class="kind">A run of llm-surgeon on a model of the family {escape(report.family)}</p>
<h1>{title}</h1>
<p class="summary">{_summary(report)}</p>
{_loading(report)}
<nav aria-label="Sections">{links}</nav>
</header>
{body}
</main>
</body>
</html>
"""


def _summary(report: PruneReport) -> str:
    parts = [f"<strong>{kept_percent(report)[-1]:.1f} %</strong> of the prunable weights kept"]
    final = report.shots[-1].perplexity if report.shots else None
    if final is not None:
        dense = report.dense_perplexity
        before = "" if dense is None else f"{perplexity_cell(dense.perplexity)} \N{RIGHTWARDS ARROW} "
        parts.append(f"perplexity <strong>{before}{perplexity_cell(final.perplexity)}</strong>")
    if report.speed is not None:
        parts.append(
            f"prefill <strong>{report.speed.prefill_ratio:.2f}{TIMES}</strong> and decoding "
            f"<strong>{report.speed.decode_ratio:.2f}{TIMES}</strong> as fast"
        )
    if report.export is not None:
        parts.append(
            f"weight files of <strong>{scaled_bytes(report.export.weight_bytes)}</strong> instead of "
            f"{scaled_bytes(report.export.dense_weight_bytes)}"
        )
    return "; ".join(parts) + "."


def _loading(report: PruneReport) -> str:
    """Code that loads the export and lets it write; empty without an export."""
    if report.export is None:
        return ""
    # The published report has only the last part of the directory's path.
    place = repr(model_name(report.export.path))
    lines = [*loading_lines(report, place), "", *using_lines(report)]
    return f"{code(chr(10).join(lines))}\n{said(why_so(report).replace('`', ''), 'notes')}"
