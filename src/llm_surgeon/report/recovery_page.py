"""A recovery on the page of a run: its curves, and the evaluations."""

from __future__ import annotations

from llm_surgeon.records import RecoveryRecord
from llm_surgeon.report.figures import inline_svg
from llm_surgeon.report.markup import figure, said, table
from llm_surgeon.report.plots import BLUE, GRID, VERMILION, Figure, tick_perplexity
from llm_surgeon.report.recovery_table import HEADINGS, recovery_note, recovery_rows


def recovery_section(record: RecoveryRecord | None) -> str:
    """Section of a run's page with the curves of a recovery."""
    if record is None:
        return said("There was none: llm-surgeon recover EXPORT --teacher MODEL --out OUT trains what is left.")
    caption = "Held-out perplexity and training loss by tokens; the dashed line is the teacher's perplexity."
    if record.teacher_perplexity is None:
        caption = "Held-out perplexity and training loss by tokens."
    picture = figure(_curves_svg(record), caption)
    rows = table("Evaluations", (*HEADINGS, "result"), recovery_rows(record))
    return "\n".join((picture, rows, said(recovery_note(record), "notes")))


def _curves_svg(record: RecoveryRecord) -> str:
    def draw(picture: Figure) -> None:
        left, right = picture.subplots(1, 2)
        points = [(point.tokens, point.perplexity.perplexity) for point in record.curves.points]
        if points:
            left.plot(*zip(*points, strict=True), color=BLUE, marker="o", linewidth=2)
        values = [value for _, value in points]
        if record.teacher_perplexity is not None:
            values.append(record.teacher_perplexity.perplexity)
            left.axhline(values[-1], color=VERMILION, linestyle="--")
        if values:
            left.set_yscale("log")
            tick_perplexity(left.yaxis, values)
        right.plot(
            *zip(*((one.tokens, one.loss) for one in record.curves.losses), strict=True), color=BLUE, linewidth=2
        )
        for axes, title in ((left, "Held-out perplexity"), (right, "Training loss (nats per token)")):
            axes.set_title(title)
            axes.set_xlabel("tokens")
            axes.grid(color=GRID)
            axes.set_axisbelow(True)

    return inline_svg("recovery", "Line charts: held-out perplexity and training loss by tokens", (9.0, 3.6), draw)
