from __future__ import annotations

import io

from rich.console import Console

from llm_surgeon.records import Failure, Speed
from llm_surgeon.records.bench import Bench, BenchModel, BenchRun, BenchTiming, OwnMeasures
from llm_surgeon.report.bench_table import bench_tables, failures, footnotes, model_row, speed_rows, types, zeros
from llm_surgeon.report.table import UNKNOWN

LONG = "a-directory-with-a-rather-long-name-as-people-give-them-[b]0.5[/b]"


def own(**changes) -> OwnMeasures:
    settings = {
        "parameters": 134_515_008, "linear_weights": 106_168_320, "zero_weights": 12, "weight_bytes": 538_090_408,
        "dtype": "bfloat16", "load_seconds": 0.514, "bytes_before": 400_000_000,
        "peaks": {1: 1_234_000_000, 8: 12_345_678_901},
    }  # fmt: skip
    return OwnMeasures(**(settings | changes))


def timing(model: str, factor: float = 1.0, seconds: float | None = None) -> BenchTiming:
    speed = Speed(
        prefill=123_456.4 * factor, decode=1_234.56 * factor, prompt=512, generated=32, batch=8, repeats=5,
        device="cpu (2 threads)", dtype="bfloat16",
    )  # fmt: skip
    return BenchTiming(model=model, speed=speed, compile_seconds=seconds)


def pair(batch: int, compiled: bool, other: str, factor: float) -> BenchRun:
    seconds = (412.3, 99.0) if compiled else (None, None)
    return BenchRun(
        batch=batch, compiled=compiled, prefill_ratio=1.436, decode_ratio=1.264,
        timings=(timing("dense", factor, seconds[0]), timing(other, 2 * factor, seconds[1])),
    )  # fmt: skip


def record(**changes) -> Bench:
    models = {"dense": own(), LONG: own(zero_weights=53_084_160), "small": own(parameters=81_430_848)}
    settings = {
        "models": tuple(BenchModel(name=name, source=f"/x/{name}", own=of) for name, of in models.items()),
        "runs": tuple(
            pair(batch, compiled, other, factor)
            for compiled in (False, True)
            for batch in (1, 8)
            for other, factor in ((LONG, 1.0), ("small", 1.5))
        ),
        "prompt": 512, "generated": 32, "repeats": 5, "device": "cpu (2 threads)", "threads": 2, "dtype": "auto",
        "versions": {"python": "3.11.7", "torch": "2.13.0"}, "date": "2026-11-22",
    }  # fmt: skip
    return Bench(**(settings | changes))


def drawn(bench: Bench) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(bench_tables(bench))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_everything_fits_in_100_columns_and_no_number_is_broken():
    text = drawn(record())
    for shown in ("134.5M", "538.1 MB", "12.35 GB", "0.51 s", "154,320", "246,913", "1.44", "1.26", "412 s", "50.0 %"):
        assert shown in text


def test_a_section_begins_with_the_reference_and_its_median_over_the_pairs():
    first, *_, last = speed_rows(record())
    assert [row[:3] for row in first] == [("1", "no", "dense"), ("", "", LONG), ("", "", "small")]
    assert [row[3] for row in first] == ["154,320", "246,913", "370,369"]
    assert [row[4] for row in first] == [UNKNOWN, "1.44", "1.44"]
    assert [row[7] for row in first] == ["1.234 GB"] * 3
    assert [row[7] for row in last] == [UNKNOWN] * 3, "compiled models are not measured for memory"
    assert [row[8] for row in first] == [UNKNOWN, UNKNOWN, UNKNOWN]
    assert last[0][:3] == ("8", "yes", "dense")
    assert [row[8] for row in last] == ["412 s", "99 s", "99 s"]


def test_models_with_zeros_are_named_and_zeros_said_to_be_no_faster():
    (note,) = zeros(record())
    assert note.startswith(f"{LONG}: removed weights are stored as zeros")
    assert "Unstructured zeros give no speed-up" in note
    assert "Unstructured zeros" in drawn(record())
    dense = record(models=record().models[:1])
    assert zeros(dense) == []


def test_types_that_differ_are_a_warning():
    assert types(record()) == []
    mixed = (*record().models, BenchModel(name="m", source="m", own=own(dtype="float32")))
    assert "bfloat16, float32" in types(record(models=mixed))[0]


def test_a_failure_is_in_its_cell_and_explained_once():
    failed = BenchTiming(model="small", failure=Failure(cause="There is no C++ compiler.", remedy="Install one."))
    runs = (BenchRun(batch=1, compiled=True, timings=(timing("dense", 1.0, 3.0), failed)),)
    two = (record().models[0], record().models[2])
    assert failures(record(models=two, runs=runs * 2)) == [
        "small, batch 1, with torch.compile, failed: There is no C++ compiler. Install one."
    ]
    (rows,) = speed_rows(record(models=two, runs=runs))
    assert rows[1] == ("", "", "small", "failed", UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN)
    assert "no C++ compiler" in drawn(record(models=two, runs=runs))
    traced = failed.model_copy(update={"failure": Failure(cause="Error: x.", remedy="", trace="...")})
    (said,) = failures(record(runs=(BenchRun(batch=1, compiled=False, timings=(traced,)),)))
    assert said.endswith("Error: x. The stack trace is in the file of --out.")


def test_one_model_is_told_that_another_can_be_named():
    alone = record(models=record().models[:1], runs=(BenchRun(batch=1, compiled=False, timings=(timing("dense"),)),))
    assert any("Name another model" in note for note in footnotes(alone))
    assert not any("torch compiles" in note for note in footnotes(alone))
    assert speed_rows(alone)[0][0][:5] == ("1", "no", "dense", "123,456", UNKNOWN)


def test_footnotes_say_how_it_was_measured():
    text = "\n".join(footnotes(record()))
    for said in (
        "cpu (2 threads), type as stored", "512 tokens", "5 alternating pairs with dense", "page cache",
        "400.0 MB", "torch 2.13.0", "2026-11-22", "fixed size",
    ):  # fmt: skip
        assert said in text
    gpu = record(
        device="cuda:0 (H100)", dtype="float16",
        models=tuple(model.model_copy(update={"own": own(bytes_before=0)}) for model in record().models),
    )  # fmt: skip
    text = "\n".join(footnotes(gpu))
    assert "cuda:0 (H100), 2 CPU threads, type float16" in text
    assert "tensors on the GPU" in text


def test_files_of_another_format_have_no_size():
    model = BenchModel(name="m", source="m", own=own(weight_bytes=0, linear_weights=0, zero_weights=0))
    assert model_row(model)[2:4] == ("0.0 %", UNKNOWN)
