from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import Cell, CellMeasures, Comparison, DenseRecord, Failure, Setting
from llm_surgeon.report.comparison_plot import comparison_png, draw_setting
from llm_surgeon.report.comparison_table import HEADINGS, comparison_markdown, comparison_tables, footnotes, panels
from llm_surgeon.report.table import UNKNOWN
from report.test_table import perplexity

HALF = Setting(structure="unstructured", sparsity=0.5)
TWO_FOUR = Setting(structure="2:4", sparsity=0.5)
VERSIONS = {"python": "3.11.9", "torch": "2.13.0"}


def cell(variant: str, value: float | None, setting: Setting = HALF, **changes: object) -> Cell:
    """A finished cell, or without a perplexity one that failed; ``changes`` replace fields."""
    measures = value and CellMeasures(
        perplexity=perplexity(value), divergence=0.43219, sparsity=0.49987, seconds=1234.56, peak=6_520_000_000,
        calibration={}, versions=VERSIONS,
    )  # fmt: skip
    values: dict[str, object] = {
        "name": f"{variant}@x", "variant": variant, "setting": setting, "model": "demo", "recipe": {},
        "status": "finished" if measures else "failed", "measures": measures,
        "failure": None if measures else Failure(cause="It broke.", remedy="Mend it."),
    }  # fmt: skip
    return Cell(**(values | changes))  # type: ignore[arg-type]


def sample_comparison(*cells: Cell) -> Comparison:
    return Comparison(
        model="someone/tiny_model", shared=PruneConfig(seed=7).model_dump(), cells=cells, date="2030-01-02",
        dense=DenseRecord(perplexity=perplexity(22.05), calibration={}, texts="ab", versions=VERSIONS),
    )  # fmt: skip


MIXED = sample_comparison(
    cell("surgeon+lora", 29.871),
    cell("magnitude", 4e7),
    cell("l-obd", None),
    cell("surgeon+lora", None, TWO_FOUR, status="impossible"),
    cell("obs [x]", 55.43, TWO_FOUR),
)


def shown(comparison: Comparison, width: int = 100) -> str:
    console = Console(file=io.StringIO(), record=True, width=width)
    console.print(comparison_tables(comparison))
    return console.export_text()


def test_rows_are_dense_then_the_cells_of_a_setting() -> None:
    first, second = panels(MIXED)
    assert first.rows == [
        ("dense", "22.05", "0", "0.0 %", UNKNOWN, UNKNOWN),
        ("surgeon+lora", "29.87", "0.4322", "50.0 %", "1,234.6", "6.520 GB"),
        ("magnitude", "4.00e+07", "0.4322", "50.0 %", "1,234.6", "6.520 GB"),
        ("l-obd", "failed", *[UNKNOWN] * 4),
    ]
    assert [row[:2] for row in second.rows] == [("dense", "22.05"), ("surgeon+lora", UNKNOWN), ("obs [x]", "55.43")]
    assert (first.setting, first.best, second.setting, second.best) == (HALF, 1, TWO_FOUR, 2)


def test_where_nothing_is_finished_nothing_is_best() -> None:
    assert [panel.best for panel in panels(sample_comparison(cell("a", None)))] == [None]
    assert panels(sample_comparison()) == []


def test_markdown_has_a_table_per_setting_with_the_best_in_bold() -> None:
    text = comparison_markdown(MIXED)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# tiny_model: methods compared", "## unstructured, 50 %", "## 2:4"]
    assert "| surgeon+lora | **29.87** | 0.4322 | 50.0 % | 1,234.6 | 6.520 GB |" in text
    assert "| magnitude | 4.00e+07 |" in text
    assert text.count("**") == 4
    assert text.count("| " + " | ".join(HEADINGS) + " |\n| --- | ---: |") == 2


def test_what_is_missing_is_explained_below() -> None:
    text = comparison_markdown(MIXED)
    assert "- l-obd, unstructured, 50 %, failed: It broke. Mend it." in text
    assert "- surgeon+lora, 2:4, not possible: It broke. Mend it." in text
    unforeseen = cell("a", None, failure=Failure(cause="KeyError: 1", remedy="", trace="Traceback ..."))
    assert "failed: KeyError: 1. The stack trace is in cells/a@x.json." in comparison_markdown(
        sample_comparison(unforeseen)
    )


def test_footnotes_say_how_it_was_measured() -> None:
    newer = cell("a", 30.0)
    assert newer.measures is not None
    newer = newer.model_copy(
        update={"measures": newer.measures.model_copy(update={"versions": VERSIONS | {"torch": "2.14.0"}})}
    )
    text = " ".join(footnotes(sample_comparison(cell("b", 31.0), newer)))
    for fact in (
        "windows of 1,024 tokens, stride 1,024, 20,460 tokens scored",
        "demo, 128 sequences of 512 tokens, seed 7",
        "python 3.11.9, torch 2.13.0 and 2.14.0. 2030-01-02.",
    ):
        assert fact in text


def test_footnotes_say_of_what_sequences_are_made() -> None:
    shared = PruneConfig(seed=7, windows_per_sample=4).model_dump()
    text = " ".join(footnotes(MIXED.model_copy(update={"shared": shared})))
    assert "128 sequences of 512 tokens in 4 windows each, seed 7" in text


def test_terminal_shows_the_same_cells_and_cuts_nothing_at_100_columns() -> None:
    comparison = sample_comparison(*MIXED.cells, cell("sparsegpt+r2-dsnot+owl+permute", 31.0))
    text = shown(comparison)
    flat = " ".join(text.split())
    for panel in panels(comparison):
        for row in panel.rows:
            assert " ".join(row) in flat
    assert max(map(len, text.splitlines())) <= 100
    assert "\u2026" not in text
    for note in footnotes(comparison):
        assert note in flat


def test_the_picture_has_the_best_on_top_and_leaves_out_what_failed() -> None:
    axes = Figure().subplots()
    draw_setting(axes, list(MIXED.cells[:3]), 22.05)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["magnitude", "surgeon+lora"]
    assert [text.get_text() for text in axes.texts] == ["4.00e+07", "29.87"]
    assert axes.get_xscale() == "log"
    assert set(axes.lines[0].get_xdata()) == {22.05}


def test_a_method_that_destroys_the_model_stands_at_the_edge() -> None:
    axes = Figure().subplots()
    draw_setting(axes, [cell("good", 30.0), cell("fair", 60.0), cell("bad", 4e7)], 22.05)
    dots = {line.get_ydata()[0]: (line.get_xdata()[0], line.get_marker()) for line in axes.lines[1:]}
    assert dots == {0: (900.0, ">"), 1: (60.0, "o"), 2: (30.0, "o")}
    assert [text.get_text() for text in axes.texts] == ["4.00e+07", "60.00", "30.00"]
    assert "off the scale" in axes.get_xlabel()


@pytest.mark.parametrize("settings", [0, 1, 4])
def test_the_picture_is_drawn_for_any_number_of_settings(tmp_path: Path, settings: int) -> None:
    some = [Setting(structure="unstructured", sparsity=0.1 * n) for n in range(1, settings + 1)]
    comparison_png(sample_comparison(*[cell("a", 30.0, setting) for setting in some]), tmp_path / "picture.png")
    picture = imread(tmp_path / "picture.png")[..., :3]
    has_dots = bool((np.abs(picture - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=-1) < 0.01).any())
    assert has_dots == (settings > 0)


def test_a_setting_without_numbers_says_so() -> None:
    axes = Figure().subplots()
    draw_setting(axes, [cell("a", None)], 22.05)
    assert [text.get_text() for text in axes.texts] == ["not measured"]
