"""A plan as tables for the terminal, and compared with the measures of the run."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from llm_surgeon.recipe.quantity import duration
from llm_surgeon.records import Plan, PlannedPhase, PruneReport
from llm_surgeon.report.table import UNKNOWN, scaled, scaled_bytes


def plan_tables(plan: Plan) -> Group:
    """Draw a plan for a terminal of 100 columns: prunable layers, result, and memory and time of each phase."""
    lines = [f"  Loads it: {loader}.\n" for loader in plan.loaders]
    if plan.further:
        lines.append(f"  Further formats: {', '.join(f'--format {name}' for name in plan.further)}.\n")
    lines += [f"  Quantised: {sentence}\n" for sentence in plan.quantising]
    loaders = Text("".join(lines), style="dim")
    return Group(_kinds(plan), _result(plan), loaders, _phases(plan))


def compared(report: PruneReport) -> list[tuple[str, str, str, str]]:
    """Rows of predicted and measured values, with the ratio of the two; empty without a plan."""
    plan, export = report.plan, report.export
    if plan is None:
        return []
    ran = {stage.name for shot in report.shots for stage in shot.stages if not stage.reports}
    seconds = sum(phase.seconds for phase in plan.phases if phase.name in ran)
    pairs: list[tuple[str, float, float]] = [("peak memory", plan.peak, report.memory.peak)]
    if export is not None:
        pairs.append(("weight files", plan.weight_bytes, export.weight_bytes))
    rows = [_compared(name, scaled_bytes(round(a)), scaled_bytes(round(b)), a, b) for name, a, b in pairs]
    taken = sum(shot.seconds for shot in report.shots)
    rows.append(_compared("time of the shots", duration(seconds), duration(taken), seconds, taken))
    return rows


def _compared(name: str, predicted: str, measured: str, a: float, b: float) -> tuple[str, str, str, str]:
    return name, predicted, measured, f"{a / b:.2f}" if b else UNKNOWN


def _kinds(plan: Plan) -> Table:
    table = _table(f"{plan.model} ({plan.family}): what is pruned", ("layers", "count", "rows", "columns", "weights"))
    for kind in plan.kinds:
        table.add_row(Text(kind.kind), f"{kind.layers:,}", f"{kind.rows:,}", f"{kind.columns:,}", scaled(kind.weights))
    return table


def _result(plan: Plan) -> Table:
    before, after = plan.dense_size, plan.size
    table = _table("What comes out", ("", "dense", "pruned"))
    table.add_row("prunable weights", scaled(before.prunable), scaled(after.prunable))
    table.add_row("all parameters", scaled(before.total), scaled(after.total))
    table.add_row("weight files", scaled_bytes(plan.dense_weight_bytes), scaled_bytes(plan.weight_bytes))
    table.add_row("disk needed", "", scaled_bytes(plan.disk))
    return table


def _phases(plan: Plan) -> Table:
    gpu = plan.device_available is not None
    headings = ("phase", "memory", *((plan.device,) if gpu else ()), "largest parts", "time")
    table = _table("What it takes", headings)
    table.columns[-2].justify = "left"
    for phase in plan.phases:
        device = (scaled_bytes(phase.device_bytes),) if gpu else ()
        table.add_row(
            phase.name, scaled_bytes(phase.host_bytes), *device, Text(_largest(phase)), duration(phase.seconds)
        )
    device = (scaled_bytes(plan.device_peak),) if gpu else ()
    table.add_section()
    table.add_row("whole run", scaled_bytes(plan.host_peak), *device, "", duration(plan.seconds))
    free = (scaled_bytes(plan.device_available),) if plan.device_available is not None else ()
    table.add_row("available", scaled_bytes(plan.host_available), *free, "", "")
    how = (
        "from one batch on this machine"
        if plan.probed
        else "rough, by rates of a common machine; --probe measures them"
    )
    table.caption = Text(
        f"Passes are {plan.order}{_streamed(plan)}{_scratch(plan)}. Peaks of each phase{_each(plan)}; on a CPU, freed "
        "memory stays with the process. "
        f"Time: {how}."
    )
    return table


def _streamed(plan: Plan) -> str:
    return ", weights come one block at a time" if plan.streamed else ""


def _each(plan: Plan) -> str:
    return f" in each of {plan.processes} processes" if plan.processes > 1 else ""


def _scratch(plan: Plan) -> str:
    return f", with up to {scaled_bytes(plan.scratch)} waiting on disk" if plan.scratch else ""


def _largest(phase: PlannedPhase) -> str:
    """The two largest parts of a phase's memory, on the GPU if there is one."""
    parts = sorted((phase.device or phase.host).items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {scaled_bytes(size)}" for name, size in parts[:2] if size)


def _table(title: str, headings: tuple[str, ...]) -> Table:
    table = Table(
        title=Text(title), title_justify="left", caption_justify="left", caption_style="dim", box=box.SIMPLE_HEAD
    )
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    return table
