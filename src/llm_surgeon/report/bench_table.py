"""Results of ``llm-surgeon bench`` as tables for the terminal: models, speed, and notes on the measurement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import median

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from llm_surgeon.records.bench import Bench, BenchModel, BenchRun, BenchTiming
from llm_surgeon.report.table import TIMES, UNKNOWN, Row, scaled, scaled_bytes

MODEL_HEADINGS = ("model", "parameters", "zeros", "weight files", "type", "load")
SPEED_HEADINGS = (
    *("batch", "torch\n.compile", "model"),
    *("prefill\ntokens/s", TIMES, "decode\ntokens/s", TIMES, "peak\nmemory", "compile\ntime"),
)


def bench_tables(bench: Bench) -> RenderableType:
    """Draw all tables, problems and notes for a terminal of 100 columns."""
    notes = [Text(note, style="dim") for note in footnotes(bench)]
    problems = [Text(problem) for problem in [*zeros(bench), *types(bench), *failures(bench)]]
    return Group(_models_table(bench), _speed_table(bench), *problems, *notes)


def model_row(model: BenchModel) -> Row:
    """Cells of a model's row, in the order of ``MODEL_HEADINGS``."""
    own = model.own
    share = own.zero_weights / own.linear_weights if own.linear_weights else 0.0
    return (
        model.name,
        scaled(own.parameters),
        f"{100 * share:.1f} %",
        scaled_bytes(own.weight_bytes) if own.weight_bytes else UNKNOWN,
        own.dtype,
        f"{own.load_seconds:.2f} s",
    )


def speed_rows(bench: Bench) -> list[list[Row]]:
    """Rows in the order of ``SPEED_HEADINGS``, in a section for each batch and way of running, reference first."""
    grouped = groupby(bench.runs, key=lambda run: (run.compiled, run.batch))
    return [_section(bench, list(runs)) for _, runs in grouped]


def zeros(bench: Bench) -> list[str]:
    """Warn of models with zeros in matrices of the old shape, which save nothing."""
    names = [model.name for model in bench.models if model.own.stores_zeros]
    if not names:
        return []
    return [
        f"{', '.join(names)}: removed weights are stored as zeros in matrices of the old shape. Unstructured zeros "
        "give no speed-up, and make no file smaller."
    ]


def types(bench: Bench) -> list[str]:
    """Warn if the models' parameters differ in type."""
    names = dict.fromkeys(model.own.dtype for model in bench.models)
    if len(names) < 2:
        return []
    return [f"The models differ in type ({', '.join(names)}), which alone changes their speed; see --dtype."]


def failures(bench: Bench) -> list[str]:
    """Sentences on the models that could not be timed, with the cause."""
    return list(dict.fromkeys(_failures(bench.runs)))


def footnotes(bench: Bench) -> list[str]:
    """Notes on the meaning of the columns, and on the machine and the way of measuring."""
    stored = "as stored" if bench.dtype == "auto" else bench.dtype
    # The name of a CPU already says its threads.
    threads = "" if bench.device.startswith("cpu") else f", {bench.threads} CPU threads"
    return [
        f"Measured on {bench.device}{threads}, type {stored}.",
        _speed_note(bench),
        *_compile_note(bench),
        "Load: the model alone in a fresh process, its files in the page cache, libraries imported; one measurement.",
        _memory_note(bench),
        "Zeros: share of the linear weights stored, without lm_head.",
        f"Versions: {', '.join(f'{package} {version}' for package, version in bench.versions.items())}. {bench.date}.",
    ]


def _models_table(bench: Bench) -> Table:
    table = _empty_table("Models", MODEL_HEADINGS, names=1)
    for model in bench.models:
        # Cells are plain text, as names of directories are not markup.
        table.add_row(*map(Text, model_row(model)))
    return table


def _speed_table(bench: Bench) -> Table:
    table = _empty_table("Speed and memory", SPEED_HEADINGS, names=3)
    for rows in speed_rows(bench):
        for row in rows:
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def _empty_table(title: str, headings: Row, names: int) -> Table:
    """Table without rows, whose first columns are for names, and the others for numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(headings):
        name = number < names
        # Long names may be broken, but not numbers.
        table.add_column(heading, justify="left" if name else "right", overflow="fold", no_wrap=not name)
    return table


def _section(bench: Bench, runs: Sequence[BenchRun]) -> list[Row]:
    """Rows of all models for one batch and way of running; only the first row says these two."""
    batch, compiled = runs[0].batch, runs[0].compiled
    rows = [_speed_cells([run.timings[0] for run in runs], None, None)]
    for run in runs:
        rows += [_speed_cells([timing], run.prefill_ratio, run.decode_ratio) for timing in run.timings[1:]]
    common = (str(batch), "yes" if compiled else "no")
    peaks = [UNKNOWN if compiled else scaled_bytes(model.own.peaks[batch]) for model in bench.models]
    return [
        (*(("", "") if number else common), *cells[:-1], peak, cells[-1])
        for number, (cells, peak) in enumerate(zip(rows, peaks, strict=True))
    ]


def _speed_cells(timings: Sequence[BenchTiming], prefill: float | None, decode: float | None) -> Row:
    """Cells of a model: its name, its speed (the reference's is the median of several), ratios, and compile time."""
    name = timings[0].model
    speeds = [timing.speed for timing in timings if timing.speed]
    if not speeds:
        return (name, "failed", *[UNKNOWN] * 4)
    # Only the first run counts: after it, torch finds most of its code in a cache.
    seconds = next((timing.compile_seconds for timing in timings if timing.compile_seconds is not None), None)
    return (
        name,
        f"{median(speed.prefill for speed in speeds):,.0f}",
        _ratio(prefill),
        f"{median(speed.decode for speed in speeds):,.1f}",
        _ratio(decode),
        UNKNOWN if seconds is None else f"{seconds:,.0f} s",
    )


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
        "Compile time: of the first run, in which torch compiles or finds it in its own cache; not in the rates. "
        "Compiled models decode with a cache of fixed size."
    ]


def _memory_note(bench: Bench) -> str:
    how = "of the model alone in a fresh process: loading, prefill and decoding, without torch.compile"
    before = max(model.own.bytes_before for model in bench.models)
    if not before:
        return f"Peak memory: of tensors on the GPU, {how}."
    return f"Peak memory: resident, {how}; Python and its libraries are {scaled_bytes(before)} of it."
