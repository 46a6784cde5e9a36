"""Sections of a run's page on its result: sizes and perplexities, shots, layers, and costs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from llm_surgeon.recipe.quantity import duration
from llm_surgeon.records import LayerRecord, PruneReport, ShotRecord
from llm_surgeon.report.figures import PANELS, costs_svg, curves_svg, evenly_spaced, kept_svg, stage_losses
from llm_surgeon.report.markup import figure, folded, said, table
from llm_surgeon.report.table import (
    HEADINGS,
    UNKNOWN,
    by_source,
    footnotes,
    perplexity_cell,
    scaled,
    table_rows,
)


def result_section(report: PruneReport) -> str:
    """Table of the dense model and the model after each shot, with notes on the way of measuring."""
    states = table("The dense model, and the model after each shot", HEADINGS, table_rows(report))
    notes = "".join(f"<li>{escape(note)}</li>" for note in footnotes(report))
    return f'{states}\n<ul class="notes">{notes}</ul>'


def shots_section(report: PruneReport) -> str:
    """Sparsity, size, perplexity and time of each shot; the inner workings of the shots are folded."""
    if not report.shots:
        return said("There were no shots.")
    headings = ("shot", "sparsity", "parameters", "perplexity", "time")
    main = table("What each shot left", headings, [_shot_row(shot) for shot in report.shots])
    about = (
        "Sparsity is the share of the prunable weights that is gone. The time is that of the shot without evaluation."
    )
    return f"{main}\n{said(about, 'notes')}\n{folded('Inner workings of each shot', _workings(report))}"


def _shot_row(shot: ShotRecord) -> tuple[str, ...]:
    return (
        str(shot.shot),
        f"{100 * shot.sparsity:.1f} %",
        scaled(shot.size.total),
        UNKNOWN if shot.perplexity is None else perplexity_cell(shot.perplexity.perplexity),
        duration(shot.seconds),
    )


def _workings(report: PruneReport) -> str:
    """Table of the inner workings: thresholds, removals and losses of each shot, and the figures of its stages."""
    headings = [
        "shot", "target sparsity", "sparsity reached", "threshold", "structures removed", "implied", "calibration loss",
    ]  # fmt: skip
    # Stages report figures of their own; a figure that no shot has gets no column.
    stages = [stage for shot in report.shots for stage in shot.stages]
    figures = dict.fromkeys((stage.name, figure.name) for stage in stages for figure in stage.figures)
    headings += [name for _, name in figures]
    rows = [(*_inner_row(shot), *(_figure_cell(shot, *key) for key in figures)) for shot in report.shots]
    notes = (
        "The threshold is the largest score removed. Implied are structures that went because nothing reads or feeds "
        "them any more. The calibration loss is that of the model before the shot, in nats per token."
    )
    notes += "".join(f" {note}" for note in dict.fromkeys(stage.note for stage in stages) if note)
    if report.config.get("cross_fit"):
        notes += (
            " All of these are means over the models of both halves of the text, before their weights became one; the "
            "losses are those of the half that reconstruction has not seen."
        )
    return f"{table('What each shot removed', headings, rows)}\n{said(notes, 'notes')}"


def _inner_row(shot: ShotRecord) -> tuple[str, ...]:
    return (
        str(shot.shot),
        f"{100 * shot.target_sparsity:.2f} %",
        f"{100 * shot.sparsity:.2f} %",
        UNKNOWN if shot.threshold is None else f"{shot.threshold:.4g}",
        f"{shot.structures_removed:,}",
        f"{shot.structures_implied:,}",
        UNKNOWN if shot.loss is None else f"{shot.loss:.4f}",
    )


def _figure_cell(shot: ShotRecord, stage: str, name: str) -> str:
    """Cell with one figure of a stage, written by its kind."""
    record = shot.stage(stage)
    found = next((figure for figure in record.figures if figure.name == name), None) if record else None
    if found is None or found.value is None:
        return UNKNOWN
    return {"count": f"{found.value:,.0f}", "share": f"{100 * found.value:.1f} %", "loss": f"{found.value:.4f}"}.get(
        found.kind, f"{found.value:.3g}"
    )


def curves_section(report: PruneReport) -> str:
    """Perplexity and loss against size: curves, or a table if a curve would have only one point."""
    measured = (
        ("Perplexity", any(shot.perplexity is not None for shot in report.shots)),
        ("The calibration loss", any(shot.loss is not None for shot in report.shots)),
    )
    missing = " ".join(f"{name} of the shots was not measured." for name, known in measured if not known)
    svg, rows = curves_svg(report), changes(report)
    if svg is None and not rows:
        return said("Neither perplexity nor calibration loss was measured.")
    if svg is None:
        alone = table("Before and after", ("", "before", "after"), rows)
        return f"{alone}\n{said(missing)}" if missing else alone
    caption = "A run goes from left to right."
    if any(stage_losses(shot) for shot in report.shots):
        caption += " The losses before and after a stage stand at the size after its shot."
    return figure(svg, f"{caption} {missing}".strip())


def changes(report: PruneReport) -> list[tuple[str, str, str]]:
    """Rows of perplexity and losses before and after, as text; measures that are not known are left out.

    The perplexities are of the dense and of the final model, the losses of the last shot.
    """
    last = report.shots[-1] if report.shots else None
    perplexities = report.dense_perplexity, None if last is None else last.perplexity
    rows = []
    if any(perplexities):
        before, after = (UNKNOWN if value is None else perplexity_cell(value.perplexity) for value in perplexities)
        rows.append(("perplexity", before, after))
    for name, first, final in by_source(*perplexities):
        before, after = (UNKNOWN if value is None else perplexity_cell(value) for value in (first, final))
        rows.append((f"perplexity on {name}", before, after))
    if last is not None and last.loss is not None:
        rows.append(("calibration loss at the start of the shot (nats per token)", f"{last.loss:.4f}", UNKNOWN))
    for stage, (first, final) in (stage_losses(last) if last is not None else {}).items():
        rows.append((f"loss of the stage {stage} (nats per token)", f"{first:.4f}", f"{final:.4f}"))
    return rows


def layers_section(layers: tuple[LayerRecord, ...]) -> str:
    """Share of each layer that is left: a map, and the folded numbers."""
    svg = kept_svg(layers)
    if svg is None:
        return said("No layers were recorded.")
    rows = [
        (
            layer.name,
            f"{layer.rows:,} of {layer.rows_dense:,}",
            f"{layer.columns:,} of {layer.columns_dense:,}",
            f"{100 * layer.kept:.1f} %",
        )
        for layer in layers
    ]
    numbers = table("What is left of each layer", ("layer", "rows kept", "columns kept", "weights kept"), rows)
    picture = figure(svg, "Layers of one kind in a block, such as experts, are taken together.")
    return f"{picture}\n{folded(f'All {len(layers):,} layers in numbers', numbers)}"


def costs_section(shots: Sequence[ShotRecord]) -> str:
    """Distribution of the scores of all candidates, kept and removed."""
    recorded = [shot for shot in shots if shot.costs is not None]
    shown = evenly_spaced(recorded, PANELS)
    svg = costs_svg(shown)
    if svg is None:
        return said("No distribution of scores was recorded: nothing was compared across layers.")
    caption = (
        "How the scores of all candidates for removal are distributed. What was removed above the threshold went "
        "because a partner did."
    )
    if len(shown) < len(recorded):
        caption += (
            f" Shown are {len(shown)} of {len(recorded)} shots: the first, the last and evenly spaced ones between."
        )
    outside = [
        f"{shot.costs.outside:,} in shot {shot.shot}" for shot in shown if shot.costs is not None and shot.costs.outside
    ]
    if outside:
        caption += f" A score of zero has no place on the axis: {', '.join(outside)}."
    return figure(svg, caption)
