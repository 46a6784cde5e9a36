"""The page of a run: everything its report holds in one HTML file that needs no network and no scripts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from llm_surgeon.records import ExportRecord, LayerRecord, Memory, PruneReport, ShotRecord, SpeedComparison
from llm_surgeon.report.card import model_name, to_yaml
from llm_surgeon.report.figures import (
    PANELS,
    costs_svg,
    curves_svg,
    evenly_spaced,
    kept_svg,
    memory_svg,
    phases_of,
    stage_losses,
    times_svg,
)
from llm_surgeon.report.plan import compared
from llm_surgeon.report.plots import kept_percent
from llm_surgeon.report.table import (
    HEADINGS,
    TIMES,
    UNKNOWN,
    footnotes,
    perplexity_cell,
    scaled_bytes,
    table_rows,
)

# Figures keep a white ground in dark mode, since their colours are chosen for it.
CSS = """\
:root { color-scheme: light dark; --ground: #fff; --text: #1b1f24; --soft: #59636e; --line: #d8dee4; --band: #f5f7f9;
  --accent: #0072B2; }
@media (prefers-color-scheme: dark) { :root { --ground: #15181c; --text: #e6e9ec; --soft: #9aa4ae; --line: #353b42;
  --band: #1d2126; --accent: #56B4E9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 2.1rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .75rem; font-size: 1.3rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem; }
p { margin: .6rem 0; }
.kind { margin: 0 0 .3rem; color: var(--soft); font-size: .9rem; }
.summary { font-size: 1.1rem; }
ul.notes { padding-left: 1.1rem; }
.notes { margin: .6rem 0; color: var(--soft); font-size: .85rem; }
nav { margin-top: 1.2rem; font-size: .9rem; }
nav a { display: inline-block; margin-right: 1rem; }
a { color: var(--accent); }
a:focus-visible, summary:focus-visible, .wide:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.wide { overflow-x: auto; margin: .9rem 0; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem .6rem .5rem 0; font-weight: 600; }
th, td { padding: .4rem .6rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid var(--line); }
td, tbody th { white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; border-bottom-width: 2px; }
tbody th { font-weight: 500; }
tbody tr:nth-child(even) { background: var(--band); }
figure { margin: 1rem 0; }
.card { overflow-x: auto; padding: .6rem; background: #fff; border: 1px solid var(--line); border-radius: 8px; }
.card svg { display: block; min-width: 620px; max-width: 100%; height: auto; margin: 0 auto; }
.card svg * { stroke-linejoin: round; stroke-linecap: butt; }
.card svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
figcaption { margin-top: .45rem; color: var(--soft); font-size: .85rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.2rem; margin: .8rem 0; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
pre { margin: .8rem 0; padding: .8rem 1rem; background: var(--band); border: 1px solid var(--line); border-radius: 8px;
  font: .85rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); }
@media print {
  :root { color-scheme: light; --ground: #fff; --text: #000; --soft: #444; --line: #bbb; --band: #f4f4f4; }
  body { font-size: 9.5pt; }
  main { max-width: none; padding: 0; }
  nav { display: none; }
  h2 { margin-top: 1.6rem; }
  h2, h3, caption { break-after: avoid; }
  figure, tr, dl, pre { break-inside: avoid; }
  .wide, .card { overflow: visible; }
  .card svg { min-width: 0; }
}
"""


def report_page(report: PruneReport) -> str:
    """Write the page of a run as one HTML document that loads nothing; what was not measured is left out or named."""
    title = f"{escape(model_name(report.model))}, pruned"
    sections = (
        ("result", "Result", _result(report)),
        ("shots", "Shots", _shots(report)),
        ("curves", "Perplexity and loss", _curves(report)),
        ("layers", "Layers", _layers(report.layers)),
        ("costs", "Costs", _costs(report.shots)),
        ("time", "Time", _time(report.shots)),
        ("memory", "Memory", _memory(report.shots, report.memory)),
        ("plan", "Plan", _plan(report)),
        ("export", "Export check", _export(report.export)),
        ("speed", "Speed", _speed(report.speed)),
        ("origin", "Origin", _origin(report)),
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


def _result(report: PruneReport) -> str:
    table = _table("The dense model, and the model after each shot", HEADINGS, table_rows(report))
    notes = "".join(f"<li>{escape(note)}</li>" for note in footnotes(report))
    return f'{table}\n<ul class="notes">{notes}</ul>'


def _shots(report: PruneReport) -> str:
    if not report.shots:
        return _said("There were no shots.")
    headings = [
        "shot", "target sparsity", "sparsity reached", "threshold", "structures removed", "implied", "calibration loss",
    ]  # fmt: skip
    # A stage says itself what it found; what no shot has is no column.
    stages = [stage for shot in report.shots for stage in shot.stages]
    figures = dict.fromkeys((stage.name, figure.name) for stage in stages for figure in stage.figures)
    headings += [name for _, name in figures]
    rows = [(*_shot_row(shot), *(_figure_cell(shot, *key) for key in figures)) for shot in report.shots]
    notes = (
        "Sparsity is the share of the prunable weights that is gone. The threshold is the largest score removed. "
        "Implied are structures that went because nothing reads or feeds them any more. The calibration loss is that "
        "of the model before the shot, in nats per token."
    )
    notes += "".join(f" {note}" for note in dict.fromkeys(stage.note for stage in stages) if note)
    if report.config.get("cross_fit"):
        notes += (
            " All of these are means over the models of both halves of the text, before their weights became one; the "
            "losses are those of the half that reconstruction has not seen."
        )
    return f"{_table('What each shot removed', headings, rows)}\n{_said(notes, 'notes')}"


def _shot_row(shot: ShotRecord) -> tuple[str, ...]:
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
    """One figure of a stage as its kind is written."""
    record = shot.stage(stage)
    found = next((figure for figure in record.figures if figure.name == name), None) if record else None
    if found is None or found.value is None:
        return UNKNOWN
    return {"count": f"{found.value:,.0f}", "share": f"{100 * found.value:.1f} %", "loss": f"{found.value:.4f}"}.get(
        found.kind, f"{found.value:.3g}"
    )


def _curves(report: PruneReport) -> str:
    svg = curves_svg(report)
    if svg is None:
        return _said("Neither perplexity nor calibration loss was measured.")
    measured = (
        ("Perplexity", any(shot.perplexity is not None for shot in report.shots)),
        ("The calibration loss", any(shot.loss is not None for shot in report.shots)),
    )
    missing = " ".join(f"{name} of the shots was not measured." for name, known in measured if not known)
    caption = "A run goes from left to right."
    if any(stage_losses(shot) for shot in report.shots):
        caption += " The losses before and after a stage stand at the size after its shot."
    return _figure(svg, f"{caption} {missing}".strip())


def _layers(layers: tuple[LayerRecord, ...]) -> str:
    svg = kept_svg(layers)
    if svg is None:
        return _said("No layers were recorded.")
    rows = [
        (
            layer.name,
            f"{layer.rows:,} of {layer.rows_dense:,}",
            f"{layer.columns:,} of {layer.columns_dense:,}",
            f"{100 * layer.kept:.1f} %",
        )
        for layer in layers
    ]
    table = _table("What is left of each layer", ("layer", "rows kept", "columns kept", "weights kept"), rows)
    return (
        f"{_figure(svg, 'Layers of one kind in a block, such as experts, are taken together.')}\n"
        f"<details>\n<summary>All {len(layers):,} layers in numbers</summary>\n{table}\n</details>"
    )


def _costs(shots: Sequence[ShotRecord]) -> str:
    recorded = [shot for shot in shots if shot.costs is not None]
    shown = evenly_spaced(recorded, PANELS)
    svg = costs_svg(shown)
    if svg is None:
        return _said("No distribution of scores was recorded: nothing was compared across layers.")
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
    return _figure(svg, caption)


def _time(shots: Sequence[ShotRecord]) -> str:
    svg = times_svg(shots)
    if svg is None:
        return _said("There were no shots.")
    phases = phases_of(shots)
    seconds = [[shot.seconds_of(phase) for phase in phases] for shot in shots]
    rows = [_seconds_row(str(shot.shot), values) for shot, values in zip(shots, seconds, strict=True)]
    if len(shots) > 1:
        rows.append(_seconds_row("all", [sum(values) for values in zip(*seconds, strict=True)]))
    table = _table("Seconds of each phase", ("shot", *phases, "sum"), rows)
    figure = _figure(svg, "The evaluation only reports on a shot; it takes no part in the pruning.")
    return "\n".join((figure, table, _profile(shots)))


def _profile(shots: Sequence[ShotRecord]) -> str:
    """What the time of the shots went to; empty if it was not measured."""
    parts = list(dict.fromkeys(part for shot in shots for part in shot.profile))
    if not parts:
        return ""
    rows = [_seconds_row(str(shot.shot), [shot.profile.get(part, 0.0) for part in parts]) for shot in shots]
    return _table("Seconds by what was done, without the evaluation", ("shot", *parts, "sum"), rows)


def _seconds_row(name: str, seconds: Sequence[float]) -> tuple[str, ...]:
    return (name, *(f"{value:,.1f}" for value in (*seconds, sum(seconds))))


def _memory(shots: Sequence[ShotRecord], memory: Memory) -> str:
    facts = _facts(
        (
            ("peak of the run", _bytes(memory.peak)),
            ("weights of the dense model", _bytes(memory.model)),
            ("largest set of curvature factors", _bytes(memory.factors)),
            ("floor, the sum of these two", _bytes(memory.floor)),
        )
    )
    svg = memory_svg(shots, memory.floor)
    if svg is None:
        return f"{facts}\n{_said('The peaks of the phases were not measured.')}"
    phases = phases_of(shots)
    rows = [(str(shot.shot), *(_peak_cell(shot, phase) for phase in phases)) for shot in shots]
    caption = "Peaks count memory of the device if it is a GPU, else memory resident in the process."
    return f"{facts}\n{_figure(svg, caption)}\n{_table('Peak of each phase', ('shot', *phases), rows)}"


def _peak_cell(shot: ShotRecord, phase: str) -> str:
    record = shot.stage(phase)
    return scaled_bytes(record.peak) if record is not None and record.peak else UNKNOWN


def _plan(report: PruneReport) -> str:
    rows = compared(report)
    if not rows:
        return _said("Nothing was predicted.")
    notes = (
        "Predicted before the model was loaded, from its configuration and the recipe. Time by rates of a common "
        "machine."
    )
    table = _table("Predicted and measured", ("", "predicted", "measured", "predicted to measured"), rows)
    return f"{table}\n{_said(notes, 'notes')}"


def _bytes(count: int) -> str:
    return scaled_bytes(count) if count > 0 else "not measured"


def _export(export: ExportRecord | None) -> str:
    if export is None:
        return _said("The model was not exported.")
    share = 100 * export.weight_bytes / export.dense_weight_bytes if export.dense_weight_bytes else 100.0
    return _facts(
        (
            ("directory", model_name(export.path)),
            ("weight files", f"{scaled_bytes(export.weight_bytes)} ({share:.1f} % of the dense model's)"),
            ("largest difference of the logits", f"{export.max_logit_difference:.1e}, loaded again from disk"),
            ("scale of the logits", f"{export.logit_scale:.3g}"),
            ("loads as", "a plain transformers class" if export.plain else "a class that the checkpoint brings"),
        )
    )


def _speed(speed: SpeedComparison | None) -> str:
    if speed is None:
        return _said("Speed was not measured.")
    dense, pruned = speed.dense, speed.pruned
    rows = (
        _speed_row("prefill", dense.prefill, pruned.prefill, speed.prefill_ratio, speed.prefill_limit),
        _speed_row("decode", dense.decode, pruned.decode, speed.decode_ratio, speed.decode_limit),
    )
    limits = _said(
        "The limit is what would be gained if time were proportional to multiplications (prefill) or to the weights "
        "read for each token (decoding, one sequence). What keeps from it: embeddings, norms and activations stay as "
        "wide as they were, small matrices run at a lower rate, and rows and columns of the residual stream are "
        "gathered by index."
    )
    # How it was measured already stands among the notes of the first table.
    return _table("Tokens per second", ("", "dense", "pruned", "pruned to dense", "limit"), rows) + limits


def _speed_row(name: str, dense: float, pruned: float, ratio: float, limit: float | None) -> tuple[str, ...]:
    best = UNKNOWN if limit is None else f"{limit:.2f}{TIMES}"
    return name, f"{dense:,.1f}", f"{pruned:,.1f}", f"{ratio:.2f}{TIMES}", best


def _origin(report: PruneReport) -> str:
    plain = report.model_dump(mode="json")
    called = _said("Called from Python: llm_surgeon.prune with the recipe below.")
    versions = _facts(report.versions.items()) if report.versions else _said("Not recorded.")
    calibration = _code(to_yaml(plain["calibration"])) if report.calibration else _said("Not recorded.")
    return "\n".join(
        (
            f"<h3>Command</h3>\n{_code(report.command) if report.command else called}{_continued(report.continued)}",
            f"<h3>Recipe</h3>\n{_code(to_yaml(plain['config']))}",
            f"<h3>Calibration data</h3>\n{calibration}",
            f"<h3>Versions</h3>\n{versions}",
        )
    )


def _continued(shots: Sequence[int]) -> str:
    if not shots:
        return ""
    return _said(f"The run was ended and continued after shot {', '.join(str(shot) for shot in shots)}.")


def _table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of text whose first column names the rows; it scrolls by itself where the page is narrow."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return (
        f'<div class="wide"><table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def _figure(svg: str, caption: str) -> str:
    return f'<figure>\n<div class="card">{svg}</div>\n<figcaption>{escape(caption)}</figcaption>\n</figure>'


def _facts(pairs: Iterable[tuple[str, str]]) -> str:
    return f"<dl>{''.join(f'<dt>{escape(term)}</dt><dd>{escape(fact)}</dd>' for term, fact in pairs)}</dl>"


def _code(text: str) -> str:
    return f"<pre><code>{escape(text.rstrip())}</code></pre>"


def _said(sentence: str, style: str = "said") -> str:
    return f'<p class="{style}">{escape(sentence)}</p>'
