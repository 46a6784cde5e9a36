from __future__ import annotations

import io

import pytest
from rich.console import Console

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import (
    ExportRecord,
    LayerRecord,
    Memory,
    Perplexity,
    PruneReport,
    ShotRecord,
    Size,
    Speed,
    SpeedComparison,
    StageRecord,
)
from llm_surgeon.report.table import (
    UNKNOWN,
    dense_and_pruned,
    footnotes,
    markdown_rows,
    scaled,
    summary_table,
    table_rows,
)

DENSE = Size(prunable=106_168_320, total=134_515_008)


def perplexity(value: float, window: int = 1024) -> Perplexity:
    return Perplexity(
        perplexity=value, nll=3.0, tokens=20_460, window=window, stride=window, data="demo:en, held out [en]",
        precision="bfloat16",
    )  # fmt: skip


def shot(number: int, kept: float, perplexity: Perplexity | None) -> ShotRecord:
    removed = round(DENSE.prunable * (1 - kept))
    return ShotRecord(
        shot=number, target_sparsity=1 - kept, sparsity=1 - kept,
        size=Size(prunable=DENSE.prunable - removed, total=DENSE.total - removed),
        threshold=0.1, structures_removed=100, structures_implied=3, loss=3.0, perplexity=perplexity,
        stages=(
            StageRecord(name="curvature", seconds=30.0), StageRecord(name="selection", seconds=1.0),
            StageRecord(name="update", seconds=9.0), StageRecord(name="evaluation", seconds=5.0, reports=True),
        ),
    )  # fmt: skip


def layers(blocks: int = 4) -> tuple[LayerRecord, ...]:
    return tuple(
        LayerRecord(
            name=f"model.layers.{block}.{kind}", block=block, kind=kind,
            rows=60 + 10 * block, columns=80 - 5 * number, rows_dense=100, columns_dense=100,
            weights=(60 + 10 * block) * (80 - 5 * number),
        )
        for block in range(blocks)
        for number, kind in enumerate(("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    )  # fmt: skip


def speed(factor: float = 1.0) -> Speed:
    return Speed(
        prefill=3210.4 * factor, decode=21.37 * factor, prompt=512, generated=32, batch=1, repeats=5,
        device="cpu (2 threads)", dtype="bfloat16",
    )  # fmt: skip


def sample_report(**changes: object) -> PruneReport:
    """A run of two shots with everything measured; ``changes`` replace fields. The other tests of reports use it."""
    config = PruneConfig(preset="none", shots=2, ignore=("lm_head", r"layers\.0\..*")).model_dump()
    values: dict[str, object] = {
        "model": "HuggingFaceTB/SmolLM2-135M",
        "family": "llama",
        "config": config,
        "calibration": {"source": "demo:en", "sha256": "ab" * 32},
        "dense_size": DENSE,
        "dense_perplexity": perplexity(15.91),
        "shots": (shot(1, 0.75, perplexity(18.2)), shot(2, 0.5, perplexity(24.68))),
        "layers": layers(),
        "memory": Memory(peak=3_200_000_000, model=538_000_000, factors=1_100_000_000),
        "versions": {"llm-surgeon": "0.1.0", "torch": "2.13.0"},
        "command": "llm-surgeon prune demo --sparsity 0.5 --shots 2",
        "export": ExportRecord(
            path="/home/someone/out", weight_bytes=162_900_000, dense_weight_bytes=269_060_000,
            max_logit_difference=2e-5, logit_scale=12.0,
        ),
        "speed": SpeedComparison(dense=speed(), pruned=speed(1.5), prefill_ratio=1.52, decode_ratio=1.48),
    }  # fmt: skip
    return PruneReport(**(values | changes))  # type: ignore[arg-type]


def terminal_lines(report: PruneReport) -> list[str]:
    console = Console(file=io.StringIO(), record=True, width=100)
    console.print(summary_table(report))
    return console.export_text().splitlines()


def test_rows_are_dense_then_each_shot() -> None:
    assert table_rows(sample_report()) == [
        ("dense", "100.0 %", "106.2M", "134.5M", "269.1 MB", "15.91", "3,210", "21.4"),
        ("shot 1", "75.0 %", "79.63M", "108.0M", UNKNOWN, "18.20", UNKNOWN, UNKNOWN),
        ("shot 2", "50.0 %", "53.08M", "81.43M", "162.9 MB", "24.68", "4,816 (1.52\u00d7)", "32.1 (1.48\u00d7)"),
    ]


def test_what_was_not_measured_is_a_dash() -> None:
    report = sample_report(dense_perplexity=None, shots=(shot(1, 0.5, None),), export=None, speed=None)
    assert [row[4:] for row in table_rows(report)] == [(UNKNOWN,) * 4] * 2
    assert not [note for note in footnotes(report) if note.startswith(("Perplexity", "Speed"))]


def test_terminal_shows_the_cells_of_the_rows() -> None:
    report = sample_report()
    shown = [line for line in terminal_lines(report) if line.strip().startswith(("dense ", "shot "))]
    assert [" ".join(line.split()) for line in shown] == [" ".join(row) for row in table_rows(report)]


def test_dense_stands_beside_pruned() -> None:
    assert dense_and_pruned(sample_report()) == [
        ("prunable weights", "106.2M", "53.08M", "50.0 %"),
        ("all parameters", "134.5M", "81.43M", "60.5 %"),
        ("bytes on disk", "269.1 MB", "162.9 MB", "60.5 %"),
        ("perplexity", "15.91", "24.68", "1.55\u00d7"),
        ("prefill tokens/s", "3,210", "4,816", "1.52\u00d7"),
        ("decode tokens/s", "21.4", "32.1", "1.48\u00d7"),
    ]


def test_measures_without_a_number_have_no_row() -> None:
    bare = sample_report(dense_perplexity=None, shots=(shot(1, 0.5, None),), export=None, speed=None)
    assert [row[0] for row in dense_and_pruned(bare)] == ["prunable weights", "all parameters"]
    half = dense_and_pruned(sample_report(dense_perplexity=None))
    assert ("perplexity", UNKNOWN, "24.68", UNKNOWN) in half
    infinite = dense_and_pruned(sample_report(shots=(shot(1, 0.5, perplexity(float("inf"))),)))
    assert ("perplexity", "15.91", "inf", UNKNOWN) in infinite
    unpruned = dense_and_pruned(sample_report(shots=()))
    assert unpruned[0] == ("prunable weights", "106.2M", "106.2M", "100.0 %")


def test_markdown_has_numbers_to_the_right() -> None:
    heading, rule, row = markdown_rows(("", "dense", "pruned"), [("a", "1", "2")])
    assert (heading, rule, row) == ("|  | dense | pruned |", "| --- | ---: | ---: |", "| a | 1 | 2 |")


def test_terminal_cuts_nothing_at_100_columns() -> None:
    large = Size(prunable=68_451_041_280, total=70_553_706_496)
    lines = terminal_lines(sample_report(dense_size=large))
    text = " ".join(" ".join(lines).split())
    assert max(map(len, lines)) <= 100
    assert "\u2026" not in text
    for note in footnotes(sample_report()):
        assert note in text  # the brackets of the data's name too: it is not markup


def test_footnotes_say_how_it_was_measured() -> None:
    text = " ".join(footnotes(sample_report()))
    for fact in (
        "embeddings and lm_head are not pruned and not in the prunable count",
        "28 linear layers in 4 blocks (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj)",
        r"Left alone by request: 'layers\.0\..*'.",
        "demo:en, held out [en]; windows of 1,024 tokens, stride 1,024, 20,460 tokens scored, bfloat16",
        "cpu (2 threads), bfloat16, batch 1; prefill of 512 tokens, then 32 decoded",
        "5 alternating pairs",
    ):
        assert fact in text


def test_perplexities_measured_differently_are_all_described() -> None:
    same = [note for note in footnotes(sample_report()) if note.startswith("Perplexity")]
    mixed = sample_report(dense_perplexity=perplexity(15.0, window=2048))
    assert len(same) == 1
    assert len([note for note in footnotes(mixed) if note.startswith("Perplexity")]) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (999, "999"),
        (999.96, "1.000k"),
        (4096, "4.096k"),
        (999_999, "1.000M"),
        (134_515_008, "134.5M"),
        (7e10, "70.00B"),
    ],
)
def test_scaled_keeps_four_digits(value: float, expected: str) -> None:
    assert scaled(value) == expected


def test_huge_perplexity_stays_narrow() -> None:
    report = sample_report(shots=(shot(1, 0.1, perplexity(1234567.0)), shot(2, 0.05, perplexity(float("inf")))))
    assert [row[5] for row in table_rows(report)] == ["15.91", "1.23e+06", "inf"]
