from __future__ import annotations

import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from llm_surgeon.records import (
    CorrectionRecord,
    CostHistogram,
    GatesRecord,
    Memory,
    PruneReport,
    ReconstructionRecord,
    ShotRecord,
)
from llm_surgeon.report.figures import (
    PHASE_COLOURS,
    draw_costs,
    draw_loss,
    draw_memory,
    draw_times,
    evenly_spaced,
    inline_svg,
    loss_points,
    peak_phases,
    power_of_ten,
    seconds_by_phase,
)
from llm_surgeon.report.page import report_page
from llm_surgeon.report.table import HEADINGS, footnotes, table_rows
from report.test_table import layers, perplexity, sample_report, shot

VOID = {"meta", "link", "br", "hr", "img", "input"}
REFERENCES = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "rdf:resource"}
COSTS = CostHistogram(
    score="cost per weight freed", exponents=(-4.0, -3.0, -2.0, -1.0), kept=(0, 20, 300), removed=(100, 10, 0),
    outside=7, threshold=0.00123,
)  # fmt: skip
CORRECTION = CorrectionRecord(steps=17, first_loss=3.456, last_loss=3.123)


class Page(HTMLParser):
    """What a page holds; fails where a tag is closed that is not the last one opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] or "" for _, attributes in self.tags if name in attributes]

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str | None = None) -> str:
        return "\n".join(data for inside, data in self.texts if tag in (None, inside))

    def rows(self) -> list[list[str]]:
        """The cells of all tables, row by row."""
        rows: list[list[str]] = []
        starts = iter(self.texts)
        for inside, data in starts:
            if inside == "th" and data in ("dense", *map(str, range(100))):
                rows.append([])
            if rows and inside in ("th", "td"):
                rows[-1].append(data)
        return rows


def full_shot(number: int, kept: float) -> ShotRecord:
    return shot(number, kept, perplexity(15.0 + number)).model_copy(
        update={
            "costs": COSTS,
            "correction": CORRECTION,
            "correction_seconds": 12.5,
            "reconstruction": ReconstructionRecord(relative_error=0.1234, scale=0.9321),
            "reconstruction_seconds": 2.5,
            "gates": GatesRecord(gates=42, steps=2, first_loss=3.4567, last_loss=3.3219, largest_change=0.123),
            "gates_seconds": 1.5,
            "peaks": dict.fromkeys(PHASE_COLOURS, 10**9 + number),
        }
    )


def full_report(number: int = 2, **changes: object) -> PruneReport:
    shots = tuple(full_shot(k, 1 - k / (number + 1)) for k in range(1, number + 1))
    return sample_report(**({"shots": shots} | changes))


def minimal_report(**changes: object) -> PruneReport:
    bare = shot(1, 0.5, None).model_copy(update={"loss": None})
    values = {
        "shots": (bare,), "dense_perplexity": None, "export": None, "speed": None, "command": None, "layers": (),
        "memory": Memory(peak=0, model=0, factors=0), "versions": {}, "calibration": {}, "config": {},
    }  # fmt: skip
    return sample_report(**(values | changes))


HOSTILE = '<script>alert("x")</script>'


def hostile_report() -> PruneReport:
    (layer, *_) = layers()
    costs = COSTS.model_copy(update={"score": f"{HOSTILE} $\\frac$"})
    peaks = {HOSTILE: 5, "$\\frac$": 7}
    worst = full_shot(1, 0.5).model_copy(update={"costs": costs, "peaks": peaks})
    return full_report(
        model=HOSTILE.replace("/", ""), family=HOSTILE, command=f"prune {HOSTILE}", versions={HOSTILE: HOSTILE},
        calibration={"source": HOSTILE}, config={"ignore": [HOSTILE]}, shots=(worst,),
        layers=(layer.model_copy(update={"name": HOSTILE, "kind": f"{HOSTILE} $\\frac$"}),),
    )  # fmt: skip


REPORTS = {
    "full": full_report(),
    "one shot": full_report(1),
    "many shots": full_report(40),
    "minimal": minimal_report(),
    "no shots": minimal_report(shots=()),
    "hostile": hostile_report(),
}


@cache
def page_text(name: str) -> str:
    return report_page(REPORTS[name])


@pytest.fixture(params=REPORTS)
def page(request: pytest.FixtureRequest) -> Page:
    return Page(page_text(request.param))


@pytest.fixture
def full() -> Page:
    return Page(page_text("full"))


def test_ids_are_unique_and_references_stay_inside(page: Page) -> None:
    ids = Counter(page.attributes("id"))
    assert [name for name, count in ids.items() if count > 1] == []
    links = [link for name in REFERENCES for link in page.attributes(name)]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    inner = {link[1:] for link in links if link.startswith("#")}
    styles = " ".join([*page.attributes("style"), *page.attributes("clip-path"), page.text("style")])
    urls = set(re.findall(r"url\(([^)]*)\)", styles))
    assert all(url.startswith("#") for url in urls)
    assert inner | {url[1:] for url in urls} <= set(ids)
    assert "@import" not in page.text("style")


def test_nothing_is_loaded_or_run(page: Page) -> None:
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "img", "metadata"})
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    # The namespaces of SVG are names, not addresses.
    addresses = {value for _, attributes in page.tags for name, value in attributes.items() if "http" in (value or "")}
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_page_is_a_document_for_people_and_screens(page: Page) -> None:
    assert page.named("html") == [{"lang": "en"}]
    assert "width=device-width, initial-scale=1" in page.attributes("content")
    assert "prefers-color-scheme: dark" in page.text("style")
    assert [attributes["role"] for attributes in page.named("svg")] == ["img"] * len(page.named("svg"))
    assert all(attributes["aria-label"] for attributes in page.named("svg"))
    assert len(page.named("svg")) == len(page.named("figure")) == len(page.named("figcaption"))
    assert len(page.named("h1")) == len(page.named("title")) == 1


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_the_same_each_time(name: str) -> None:
    first, second = page_text(name), report_page(REPORTS[name])
    assert first == second
    assert first.startswith("<!DOCTYPE html>\n")
    assert "<?xml" not in first
    assert first.count("<!") == 1  # no comments, no second document type


def test_hostile_names_stay_text() -> None:
    text = page_text("hostile")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    page = Page(text)
    assert page.text("h1") == '<script>alert("x")<script>, pruned'
    for tag in ("code", "dd", "dt", "p", "th", "text"):
        assert HOSTILE in page.text(tag), tag
    assert "$\\frac$" in page.text("text")  # no mathematics either


def test_title_and_export_hide_the_directories() -> None:
    page = Page(report_page(full_report(model="/home/someone/models/mine")))
    assert page.text("h1") == page.text("title") == "mine, pruned"
    assert "/home/someone" not in page.text()


def test_summary_has_the_numbers_that_matter(full: Page) -> None:
    summary = full.text("strong").split("\n")
    assert summary == ["33.3 %", "15.91 \u2192 17.00", "1.52\u00d7", "1.48\u00d7", "162.9 MB"]


def test_first_table_is_that_of_the_other_reports(full: Page) -> None:
    report = REPORTS["full"]
    headings = [data for inside, data in full.texts if inside == "th"]
    assert tuple(headings[: len(HEADINGS)]) == HEADINGS
    cells = [data for inside, data in full.texts if inside in ("th", "td")]
    assert cells[len(HEADINGS) : len(HEADINGS) * 4] == [cell for row in table_rows(report) for cell in row]
    assert set(footnotes(report)) <= set(full.text("li").split("\n"))


def test_shots_are_shown_in_numbers(full: Page) -> None:
    rows = full.rows()
    assert ["1", "33.33 %", "33.33 %", "0.1", "100", "3", "3.0000", "17", "3.4560", "3.1230", "12.3 %", "0.932",
            "42", "3.4567", "3.3219"] in rows  # fmt: skip
    assert ["1", "30.0", "1.0", "9.0", "2.5", "1.5", "12.5", "5.0", "61.5"] in rows
    assert ["1", *["1.000 GB"] * 7] in rows
    assert "all" in full.text("th").split("\n")


def test_phases_stand_in_the_pictures_and_in_the_tables(full: Page) -> None:
    for phase in PHASE_COLOURS:
        assert full.text("text").split("\n").count(phase) == 2  # time and memory
        assert full.text("th").split("\n").count(phase) == 2


def test_layers_stand_in_the_details(full: Page) -> None:
    report = REPORTS["full"]
    assert len(full.named("details")) == 1
    assert {layer.name for layer in report.layers} <= set(full.text("th").split("\n"))
    assert "60 of 100" in full.text("td").split("\n")
    assert "48.0 %" in full.text("td").split("\n")


def test_threshold_and_floor_are_written(full: Page) -> None:
    drawn = full.text("text").split("\n")
    assert drawn.count("shot 1: threshold 0.00123") == 1
    assert "floor (1.638 GB)" in drawn
    assert "7 in shot 1, 7 in shot 2" in full.text("figcaption")


def test_continued_runs_say_so() -> None:
    report = sample_report()
    assert "continued after" not in report_page(report)
    continued = report_page(report.model_copy(update={"continued": (2, 3)}))
    assert "The run was ended and continued after shot 2, 3." in continued


def test_origin_is_exact(full: Page) -> None:
    command, recipe, calibration = [data for inside, data in full.texts if inside == "code"]
    assert command == "llm-surgeon prune demo --sparsity 0.5 --shots 2"
    assert "layers\\.0\\..*" in recipe
    assert "shots: 2" in recipe
    assert calibration == f"source: demo:en\nsha256: {'ab' * 32}"
    assert "2.13.0" in full.text("dd").split("\n")


def test_what_is_missing_is_said() -> None:
    text = Page(page_text("minimal")).text()
    for sentence in (
        "Neither perplexity nor calibration loss was measured.", "No layers were recorded.",
        "No distribution of scores was recorded", "The peaks of the phases were not measured.",
        "The model was not exported.", "Speed was not measured.", "Called from Python", "Not recorded.",
    ):  # fmt: skip
        assert sentence in text
    assert "perplexity of the shots" not in text.lower()
    assert "correction steps" not in text
    assert "error of the stream" not in text
    assert "loss before them" not in text
    without = Page(report_page(full_report(dense_perplexity=None, shots=(shot(1, 0.5, None),)))).text()
    assert "Perplexity of the shots was not measured." in without


def test_numbers_of_both_halves_are_said_to_be_means() -> None:
    assert "both halves" not in page_text("full")
    assert "both halves" in Page(report_page(full_report(config={"cross_fit": True}))).text()


def test_zero_peaks_and_values_that_are_not_finite_are_survived() -> None:
    infinite = perplexity(float("inf"))
    costs = COSTS.model_copy(update={"threshold": 0.0, "kept": (0, 0, 0), "removed": (0, 0, 0)})
    changes = {"loss": float("nan"), "peaks": {"curvature": 0}, "costs": costs, "perplexity": infinite}
    report = sample_report(shots=(shot(1, 0.5, None).model_copy(update=changes),), dense_perplexity=infinite)
    text = Page(report_page(report)).text()
    assert "The peaks of the phases were not measured." in text
    assert "inf \u2192 inf" in text
    assert "shot 1: threshold 0" in text


def test_histogram_shows_counts_and_threshold() -> None:
    axes = Figure().subplots()
    draw_costs(axes, COSTS)
    kept, removed = (patch for patch in axes.patches if isinstance(patch, StepPatch))
    assert list(kept.get_data().values) == [0.5, 20, 300]  # an empty bin lies on the lower edge
    assert list(removed.get_data().values) == [100, 10, 0.5]
    assert list(kept.get_data().edges) == list(COSTS.exponents)
    (line,) = axes.lines
    assert line.get_xdata() == pytest.approx([-2.910, -2.910], abs=1e-3)
    assert axes.get_yscale() == "log"


def test_histogram_without_a_threshold_has_no_line() -> None:
    axes = Figure().subplots()
    draw_costs(axes, COSTS.model_copy(update={"threshold": 0.0}))
    assert not axes.lines


def test_at_most_six_histograms_are_shown_and_the_page_says_so() -> None:
    page = Page(page_text("many shots"))
    titles = [data for _, data in page.texts if "threshold 0.00123" in data]
    assert [int(title.split(":")[0].split()[1]) for title in titles] == [1, 9, 17, 24, 32, 40]
    assert "Shown are 6 of 40 shots" in page.text("figcaption")
    assert "Shown are" not in Page(report_page(full_report(6))).text()


@pytest.mark.parametrize(
    ("number", "most", "expected"), [(0, 6, []), (3, 6, [0, 1, 2]), (7, 2, [0, 6]), (11, 6, [0, 2, 4, 6, 8, 10])]
)
def test_evenly_spaced(number: int, most: int, expected: list[int]) -> None:
    assert evenly_spaced(range(number), most) == expected


def test_loss_belongs_to_the_size_before_its_shot() -> None:
    shots = (full_shot(1, 0.75), full_shot(2, 0.5).model_copy(update={"loss": None}), full_shot(3, 0.25))
    report = sample_report(shots=shots)
    assert loss_points(report) == [(100.0, 3.0), (50.0, 3.0)]
    axes = Figure().subplots()
    draw_loss(axes, report)
    before, first, last = axes.lines
    assert list(before.get_xdata()) == [100, 50]
    assert list(first.get_xdata()) == list(last.get_xdata()) == [75, 50, 25]
    assert set(first.get_ydata()) == {3.456}
    assert set(last.get_ydata()) == {3.123}


def test_bars_of_time_end_at_the_sum() -> None:
    figure = Figure()
    draw_times(figure, [full_shot(1, 0.75), full_shot(2, 0.5)])
    (axes,) = figure.axes
    assert len(axes.patches) == 2 * len(PHASE_COLOURS)
    assert max(bar.get_x() + bar.get_width() for bar in axes.patches) == pytest.approx(61.5)
    assert [text.get_text() for text in axes.texts] == ["61.5", "61.5"]
    assert sum(seconds_by_phase(full_shot(1, 0.75)).values()) == full_shot(1, 0.75).seconds + 5


def test_bars_of_memory_stand_side_by_side_with_the_floor() -> None:
    figure = Figure()
    other = full_shot(2, 0.5).model_copy(update={"peaks": {"evaluation": 30, "curvature": 20, "loading": 40}})
    shots = [shot(1, 0.75, None), other]
    assert peak_phases(shots) == ["curvature", "evaluation", "loading"]
    draw_memory(figure, shots, floor=10)
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == [0, 20, 0, 30, 0, 40]
    assert list(axes.lines[0].get_ydata()) == [10, 10]
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in axes.patches)
    assert all(after[0] >= before[1] - 1e-9 for before, after in pairwise(edges))


@pytest.mark.parametrize(("exponent", "text"), [(-12.0, "10\u207b\u00b9\u00b2"), (3, "10\u00b3"), (0.5, "")])
def test_power_of_ten(exponent: float, text: str) -> None:
    assert power_of_ten(exponent) == text


def test_inline_svg_keeps_the_text_and_only_ids_in_use() -> None:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([1, 2], marker="o")
        axes.set_title('a <b> id="c" & $\\frac$')

    one, two = (inline_svg(name, 'a "label"', (3, 2), draw) for name in ("one", "two"))
    assert one.startswith('<svg role="img" aria-label="a &quot;label&quot;" ')
    assert one.endswith("</svg>")
    pages = Page(one), Page(two)
    assert 'a <b> id="c" & $\\frac$' in pages[0].text("text")
    first, second = (set(page.attributes("id")) for page in pages)
    assert first
    assert first.isdisjoint(second)
