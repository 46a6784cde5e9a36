"""A recovery in a terminal and in a model card."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llm_surgeon.recipe.quantity import duration
from llm_surgeon.records import RecoveryRecord
from llm_surgeon.report.table import escape, fenced, markdown_rows, perplexity_cell, scaled_bytes

HEADINGS = ("tokens", "training loss", "held-out perplexity", "time")
_RESULT = "the result"


def recovery_table(record: RecoveryRecord) -> RenderableType:
    """Draw the evaluations of a recovery, one row each, for a terminal."""
    drawn = Table(box=box.SIMPLE_HEAD)
    for heading in (*HEADINGS, ""):
        drawn.add_column(heading, justify="right")
    for row in recovery_rows(record):
        drawn.add_row(*row)
    return Group(drawn, Text(recovery_note(record), style="dim"))


def recovery_in_card(record: RecoveryRecord) -> str:
    """Section of a model card on a recovery."""
    rows = [tuple(map(escape, row)) for row in recovery_rows(record)]
    body = "\n".join(markdown_rows((*HEADINGS, ""), rows))
    command = f"\n{fenced('bash', record.command)}" if record.command else ""
    return f"## Recovery\n\n{escape(recovery_note(record))} The figures above are from before it.\n\n{body}\n{command}"


def recovery_rows(record: RecoveryRecord) -> list[tuple[str, str, str, str, str]]:
    """Tokens, loss, perplexity and time of each evaluation, and which of them is the result."""
    losses = {point.tokens: point.loss for point in record.curves.losses}
    found = []
    for point in record.curves.points:
        # A point of the loss is the mean of a few steps up to there.
        near = [tokens for tokens in losses if tokens <= point.tokens]
        loss = f"{losses[max(near)]:.4f}" if near else ""
        mark = _RESULT if point.tokens == record.result_tokens else ""
        perplexity = perplexity_cell(point.perplexity.perplexity)
        found.append((f"{point.tokens:,}", loss, perplexity, duration(point.seconds), mark))
    return found


def recovery_note(record: RecoveryRecord) -> str:
    """Sentences on what was trained on, and how."""
    texts = "; ".join(
        f"{use.source}: {use.sequences:,} sequences, read {use.passes:.2g} times" for use in record.sources
    )
    learnt = f"the predictions of {record.teacher}" if record.teacher else "the text's own tokens"
    parts = [
        f"Trained {record.trained:,} of {record.parameters:,} parameters on {learnt}, {record.tokens:,} tokens "
        f"({texts}), in {duration(record.seconds)} with a peak of {scaled_bytes(record.peak_memory)}."
    ]
    if record.perplexity is not None:
        parts.append(f"Perplexity of the result as it is stored: {perplexity_cell(record.perplexity.perplexity)}.")
    if record.teacher_perplexity is not None:
        parts.append(f"Perplexity of the teacher: {perplexity_cell(record.teacher_perplexity.perplexity)}.")
    if record.stopped_early:
        parts.append("It ended early, as perplexity became no better, or a loss was not finite.")
    return " ".join(parts)
