"""What ``llm-surgeon bench`` measured, as tables for the terminal: the models, their speed, and how it was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llm_surgeon.evaluation.bench_records import Bench, BenchModel, BenchRun, BenchTiming
from llm_surgeon.records import Speed
from llm_surgeon.report.table import TIMES, UNKNOWN, Row, scaled, scaled_bytes

SPEED_HEADINGS = ("model", "prefill tokens/s", TIMES, "decode tokens/s", TIMES, "compile")


def bench_tables(bench: Bench) -> RenderableType:
    """Draw everything for a terminal of 100 columns."""
    notes = [Text(note, style="dim") for note in footnotes(bench)]
    problems = [Text(problem) for problem in [*zeros(bench), *failures(bench)]]
    return Group(_models_table(bench), *_speed_tables(bench), *problems, *notes)


def model_headings(bench: Bench) -> Row:
    """A column of peak memory for each batch."""
    peaks = (f"peak memory, batch {batch}" for batch in bench.models[0].own.peaks)
    return ("model", "parameters", "zeros", "weight files", "type", "load", *peaks)


def model_row(model: BenchModel) -> Row:
    """The cells of ``model_headings``."""
    own = model.own
    share = own.zero_weights / own.linear_weights if own.linear_weights else 0.0
    return (
        model.name,
        scaled(own.parameters),
        f"{100 * share:.1f} %",
        scaled_bytes(own.weight_bytes) if own.weight_bytes else UNKNOWN,
        own.dtype,
        f"{own.load_seconds:.2f} s",
        *(scaled_bytes(peak) for peak in own.peaks.values()),
    )


def speed_rows(bench: Bench, runs: Sequence[BenchRun]) -> list[Row]:
    """The cells of ``SPEED_HEADINGS`` for runs of one batch: the reference, then the others with their ratios."""
    first = bench.models[0].name
    rows = [_speed_row(first, [run.timings[0] for run in runs], None)]
    return rows + [_speed_row(timing.model, [timing], run) for run in runs for timing in run.timings[1:]]


def zeros(bench: Bench) -> list[str]:
    """Name the models with zeros in matrices of the old shape, and say that these save nothing."""
    names = [model.name for model in bench.models if model.own.stores_zeros]
    if not names:
        return []
    return [
        f"{', '.join(names)}: removed weights are stored as zeros in matrices of the old shape. Unstructured zeros "
        "give no speed-up, and make no file smaller."
    ]


def failures(bench: Bench) -> list[str]:
    """Say of each model that could not be timed why not."""
    return list(dict.fromkeys(_failures(bench.runs)))


def footnotes(bench: Bench) -> list[str]:
    """Say what the columns count, and on what and how everything was measured."""
    return [
        f"Measured on {bench.device}, {bench.threads} threads; type: {bench.dtype}.",
        _speed_note(bench),
        *_compile_note(bench),
        "Load: the model alone in a fresh process, its files in the page cache, libraries imported; one measurement.",
        _memory_note(bench),
        "Zeros: share of the linear weights stored, without lm_head.",
        f"Versions: {', '.join(f'{package} {version}' for package, version in bench.versions.items())}. {bench.date}.",
    ]


def _models_table(bench: Bench) -> Table:
    return _table("Models, each alone in a process", model_headings(bench), map(model_row, bench.models))


def _speed_tables(bench: Bench) -> list[Table]:
    """A table for each batch and way of running."""
    tables = []
    for (compiled, batch), runs in groupby(bench.runs, key=lambda run: (run.compiled, run.batch)):
        title = f"Speed, batch {batch}, {'with' if compiled else 'without'} torch.compile"
        rows = speed_rows(bench, list(runs))
        headings = SPEED_HEADINGS if compiled else SPEED_HEADINGS[:-1]
        tables.append(_table(title, headings, [row[: len(headings)] for row in rows]))
    return tables


def _table(title: str, headings: Row, rows: Iterable[Row]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        table.add_column(
            heading.replace(", ", ",\n", 1), justify="right" if number else "left", overflow="fold", no_wrap=number > 0
        )
    for row in rows:
        # As text: names of directories are not markup.
        table.add_row(*map(Text, row))
    return table


def _speed_row(name: str, timings: Sequence[BenchTiming], run: BenchRun | None) -> Row:
    """A model's speed in one pair, or the reference's in several."""
    speeds = [timing.speed for timing in timings if timing.speed]
    if not speeds:
        return (name, "failed", *[UNKNOWN] * (len(SPEED_HEADINGS) - 2))
    seconds = [timing.compile_seconds for timing in timings if timing.compile_seconds is not None]
    return (
        name,
        f"{_median(speeds, 'prefill'):,.0f}",
        _ratio(run.prefill_ratio if run else None),
        f"{_median(speeds, 'decode'):,.1f}",
        _ratio(run.decode_ratio if run else None),
        # The first time; after that, torch finds most of it in its cache.
        f"{seconds[0]:,.0f} s" if seconds else UNKNOWN,
    )


def _median(speeds: Sequence[Speed], name: str) -> float:
    return median(float(getattr(speed, name)) for speed in speeds)


def _ratio(ratio: float | None) -> str:
    return UNKNOWN if ratio is None else f"{ratio:.2f}"


def _failures(runs: Iterable[BenchRun]) -> Iterable[str]:
    for run in runs:
        for timing in run.timings:
            if timing.failure is not None:
                how = ", with torch.compile" if run.compiled else ""
                remedy = "The stack trace is in the file of --out." if timing.failure.trace else timing.failure.remedy
                yield f"{timing.model}, batch {run.batch}{how}, failed: {timing.failure.cause} {remedy}"


def _speed_note(bench: Bench) -> str:
    timed = f"prefill of {bench.prompt:,} tokens a sequence, then {bench.generated:,} decoded one by one with the cache"
    if len(bench.models) == 1:
        return f"Speed: {timed}; medians of {bench.repeats} runs. Name another model to have it compared."
    several = " (the reference's: over those with all the others)" if len(bench.models) > 2 else ""
    return (
        f"Speed: {timed}; medians of {bench.repeats} alternating pairs with {bench.models[0].name}{several}. {TIMES}: "
        f"median of the pairs' ratios to {bench.models[0].name}; above 1 is faster."
    )


def _compile_note(bench: Bench) -> list[str]:
    if not any(run.compiled for run in bench.runs):
        return []
    return [
        "Compile: seconds of the first run, in which torch compiles, or finds it in its cache; it is not in the "
        "rates. The compiled models use a cache of fixed size."
    ]


def _memory_note(bench: Bench) -> str:
    what = "load, prefill and decoding, without torch.compile"
    before = max(model.own.bytes_before for model in bench.models)
    if not before:
        return f"Peak memory: of tensors on the GPU, {what}."
    return f"Peak memory: resident in the process, {what}; Python and libraries are {scaled_bytes(before)} of it."
