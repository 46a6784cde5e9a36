from __future__ import annotations

from report.test_page import HOSTILE, Page
from report.test_table import sample_report, shot


def test_summary_is_what_is_read_first() -> None:
    assert sample_report().summary().splitlines() == [
        "model:        HuggingFaceTB/SmolLM2-135M",
        "kept:         50.0 % of the prunable weights (106.2M \u2192 53.08M)",
        "parameters:   134.5M \u2192 81.43M",
        "perplexity:   15.91 \u2192 24.68",
        "weight files: 269.1 MB \u2192 162.9 MB",
        "speed:        prefill 1.52\u00d7, decoding 1.48\u00d7",
        "export:       /home/someone/out",
    ]


def test_what_was_not_measured_is_left_out() -> None:
    bare = sample_report(dense_perplexity=None, shots=(shot(1, 0.5, None),), export=None, speed=None)
    assert [line.split(":")[0] for line in bare.summary().splitlines()] == ["model", "kept", "parameters"]
    assert "100.0 %" in sample_report(shots=()).summary()


def test_a_notebook_shows_the_same_as_a_table() -> None:
    report = sample_report()
    page = Page(report._repr_html_())
    lines = dict(line.split(":", 1) for line in report.summary().splitlines())
    assert page.text("th").split("\n") == list(lines)
    assert page.text("td").split("\n") == [fact.strip() for fact in lines.values()]


def test_a_notebook_shows_hostile_names_as_text() -> None:
    html = sample_report(model=HOSTILE)._repr_html_()
    assert "<script" not in html
    assert HOSTILE in Page(html).text("td")
