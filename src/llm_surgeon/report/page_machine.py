"""Sections of a run's page on the machine: time, memory, plan, export, speed and origin."""

from __future__ import annotations

from collections.abc import Sequence

from llm_surgeon.records import ExportRecord, FormatRecord, Memory, PruneReport, ShotRecord, SpeedComparison
from llm_surgeon.report.card import model_name, to_yaml
from llm_surgeon.report.figures import memory_svg, phases_of, times_svg
from llm_surgeon.report.loading import reloaded
from llm_surgeon.report.markup import code, facts, figure, folded, said, table
from llm_surgeon.report.plan_table import compared
from llm_surgeon.report.table import TIMES, UNKNOWN, scaled_bytes


def time_section(shots: Sequence[ShotRecord]) -> str:
    """Seconds of each phase of each shot, as a picture and as a table."""
    svg = times_svg(shots)
    if svg is None:
        return said("There were no shots.")
    phases = phases_of(shots)
    seconds = [[shot.seconds_of(phase) for phase in phases] for shot in shots]
    rows = [_seconds_row(str(shot.shot), values) for shot, values in zip(shots, seconds, strict=True)]
    if len(shots) > 1:
        rows.append(_seconds_row("all", [sum(values) for values in zip(*seconds, strict=True)]))
    picture = figure(svg, "The evaluation only reports on a shot; it takes no part in the pruning.")
    return "\n".join((picture, table("Seconds of each phase", ("shot", *phases, "sum"), rows), _profile(shots)))


def _profile(shots: Sequence[ShotRecord]) -> str:
    """Table of the shots' time by kind of work; empty if it was not measured."""
    parts = list(dict.fromkeys(part for shot in shots for part in shot.profile))
    if not parts:
        return ""
    rows = [_seconds_row(str(shot.shot), [shot.profile.get(part, 0.0) for part in parts]) for shot in shots]
    return table("Seconds by what was done, without the evaluation", ("shot", *parts, "sum"), rows)


def _seconds_row(name: str, seconds: Sequence[float]) -> tuple[str, ...]:
    return (name, *(f"{value:,.1f}" for value in (*seconds, sum(seconds))))


def memory_section(shots: Sequence[ShotRecord], memory: Memory) -> str:
    """Peak memory of the run and of each phase."""
    whole = facts(
        (
            ("peak of the run", _bytes(memory.peak)),
            ("weights of the dense model", _bytes(memory.model)),
            ("largest set of curvature factors", _bytes(memory.factors)),
            ("floor, the sum of these two", _bytes(memory.floor)),
        )
    )
    svg = memory_svg(shots, memory.floor)
    if svg is None:
        return f"{whole}\n{said('The peaks of the phases were not measured.')}"
    phases = phases_of(shots)
    rows = [(str(shot.shot), *(_peak_cell(shot, phase) for phase in phases)) for shot in shots]
    caption = "Peaks count memory of the device if it is a GPU, else memory resident in the process."
    return f"{whole}\n{figure(svg, caption)}\n{table('Peak of each phase', ('shot', *phases), rows)}"


def _peak_cell(shot: ShotRecord, phase: str) -> str:
    record = shot.stage(phase)
    return scaled_bytes(record.peak) if record is not None and record.peak else UNKNOWN


def plan_section(report: PruneReport) -> str:
    """Predictions of the plan beside the measured values."""
    rows = compared(report)
    if not rows:
        return said("Nothing was predicted.")
    notes = (
        "Predicted before the model was loaded, from its configuration and the recipe. Time by rates of a common "
        "machine."
    )
    headings = ("", "predicted", "measured", "predicted to measured")
    return f"{table('Predicted and measured', headings, rows)}\n{said(notes, 'notes')}"


def _bytes(count: int) -> str:
    return scaled_bytes(count) if count > 0 else "not measured"


def export_section(export: ExportRecord | None) -> str:
    """Files of the export, and the check that they compute the same as the model in memory."""
    if export is None:
        return said("The model was not exported.")
    share = 100 * export.weight_bytes / export.dense_weight_bytes if export.dense_weight_bytes else 100.0
    return facts(
        (
            ("directory", model_name(export.path)),
            ("weight files", f"{scaled_bytes(export.weight_bytes)} ({share:.1f} % of the dense model's)"),
            *((("loads as", _class_of(export)),) if export.pretrained else ()),
            *((f"format {form.name}", _format_fact(form)) for form in export.written),
        )
    )


def _class_of(export: ExportRecord) -> str:
    return "a plain transformers class" if export.plain else "a class that the checkpoint brings"


def _format_fact(form: FormatRecord) -> str:
    """Files of a format, and how far the logits that its engine computes are from the model in memory."""
    files = f"{scaled_bytes(form.weight_bytes)}{f' in {form.directory}' if form.directory else ''}"
    return f"{files}. {reloaded(form)}"


def speed_section(speed: SpeedComparison | None) -> str:
    """Tokens per second of the dense and of the pruned model."""
    if speed is None:
        return said("Speed was not measured.")
    dense, pruned = speed.dense, speed.pruned
    rows = (
        _speed_row("prefill", dense.prefill, pruned.prefill, speed.prefill_ratio, speed.prefill_limit),
        _speed_row("decode", dense.decode, pruned.decode, speed.decode_ratio, speed.decode_limit),
    )
    limits = said(
        "The limit is what would be gained if time were proportional to multiplications (prefill) or to the weights "
        "read for each token (decoding, one sequence). What keeps from it: embeddings, norms and activations stay as "
        "wide as they were, small matrices run at a lower rate, and rows and columns of the residual stream are "
        "gathered by index."
    )
    # The notes of the first table already say how speed was measured.
    return table("Tokens per second", ("", "dense", "pruned", "pruned to dense", "limit"), rows) + limits


def _speed_row(name: str, dense: float, pruned: float, ratio: float, limit: float | None) -> tuple[str, ...]:
    best = UNKNOWN if limit is None else f"{limit:.2f}{TIMES}"
    return name, f"{dense:,.1f}", f"{pruned:,.1f}", f"{ratio:.2f}{TIMES}", best


def origin_section(report: PruneReport) -> str:
    """Command, recipe, calibration data and versions: all that is needed to repeat the run."""
    plain = report.model_dump(mode="json")
    called = said("Called from Python: llm_surgeon.prune with the recipe below.")
    versions = facts(report.versions.items()) if report.versions else said("Not recorded.")
    calibration = code(to_yaml(plain["calibration"])) if report.calibration else said("Not recorded.")
    return "\n".join(
        (
            f"<h3>Command</h3>\n{code(report.command) if report.command else called}{_continued(report.continued)}",
            f"<h3>Recipe</h3>\n{folded('All options', code(to_yaml(plain['config'])))}",
            f"<h3>Calibration data</h3>\n{calibration}",
            f"<h3>Versions</h3>\n{versions}",
        )
    )


def _continued(shots: Sequence[int]) -> str:
    if not shots:
        return ""
    return said(f"The run was ended and continued after shot {', '.join(str(shot) for shot in shots)}.")
