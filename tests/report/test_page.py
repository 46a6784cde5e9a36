from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser

import pytest
import yaml

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import CostHistogram, Memory, PruneReport, ShotRecord, StageRecord
from llm_surgeon.records import Figure as StageFigure
from llm_surgeon.report.figures import (
    PHASE_COLOURS,
    VARIABLES,
    curves_svg,
)
from llm_surgeon.report.loading import loading_lines
from llm_surgeon.report.page import report_page
from llm_surgeon.report.table import HEADINGS, footnotes, table_rows
from report.test_table import layers, perplexity, sample_report, shot

VOID = {"meta", "link", "br", "hr", "img", "input"}
REFERENCES = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "rdf:resource"}
COSTS = CostHistogram(
    score="cost per weight freed", exponents=(-4.0, -3.0, -2.0, -1.0), kept=(0, 20, 300), removed=(100, 10, 0),
    outside=7, threshold=0.00123,
)  # fmt: skip
NOTES = {"reconstruction": "Note on reconstruction.", "gates": "Note on gates.", "correction": "Note on correction."}
FIGURES = {
    "reconstruction": (("error of the stream", 0.1234, "share"), ("scale of predictions", 0.9321, "number")),
    "gates": (("number of gates", 42, "count"), ("loss before them", 3.4567, "loss"), ("loss after", 3.3219, "loss")),
    "correction": (("correction steps", 17, "count"), ("first loss", 3.456, "loss"), ("last loss", 3.123, "loss")),
}
SECONDS = {"curvature": 30.0, "selection": 1.0, "update": 9.0, "reconstruction": 2.5, "gates": 1.5, "correction": 12.5}


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


def stages(number: int) -> tuple[StageRecord, ...]:
    """All stages that a shot can have, the evaluation with them."""
    fitted = (
        StageRecord(
            name=name, seconds=seconds, peak=10**9 + number, note=NOTES.get(name, ""),
            figures=tuple(StageFigure(name=f, value=v, kind=k) for f, v, k in FIGURES.get(name, ())),
        )
        for name, seconds in SECONDS.items()
    )  # fmt: skip
    return (*fitted, StageRecord(name="evaluation", seconds=5.0, peak=10**9 + number, reports=True))


def full_shot(number: int, kept: float) -> ShotRecord:
    changes = {"costs": COSTS, "stages": stages(number)}
    return shot(number, kept, perplexity(15.0 + number)).model_copy(update=changes)


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
    figures = (StageFigure(name=HOSTILE, value=1.0),)
    named = tuple(
        StageRecord(name=name, seconds=1.0, peak=5, figures=figures, note=HOSTILE) for name in (HOSTILE, "$\\frac$")
    )
    worst = full_shot(1, 0.5).model_copy(update={"costs": costs, "stages": named})
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
    assert HOSTILE in page.text("td") + page.text("p")
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
    assert ["1", "33.3 %", "99.13M", "16.00", "56 s"] in rows
    assert ["1", "33.33 %", "33.33 %", "0.1", "100", "3", "3.0000", "12.3 %", "0.932", "42", "3.4567", "3.3219", "17",
            "3.4560", "3.1230"] in rows  # fmt: skip
    assert ["1", "30.0", "1.0", "9.0", "2.5", "1.5", "12.5", "5.0", "61.5"] in rows
    assert ["1", *["1.000 GB"] * 7] in rows
    assert "all" in full.text("th").split("\n")
    assert all(note in full.text("p") for note in NOTES.values())


def test_inner_workings_of_shots_are_folded() -> None:
    shots = page_text("full").split('<section id="shots">')[1].split("</section>")[0]
    open_part, folded = shots.split("<details>")
    for words in ("parameters", "perplexity", "time"):
        assert words in open_part
    for words in ("threshold", "implied", "number of gates", "Note on gates.", "target sparsity"):
        assert words not in open_part
        assert words in folded
    assert folded.rstrip().endswith("</details>")


def test_phases_stand_in_the_pictures_and_in_the_tables(full: Page) -> None:
    for phase in PHASE_COLOURS:
        assert full.text("text").split("\n").count(phase) == 2  # time and memory
        assert full.text("th").split("\n").count(phase) == 2


def test_layers_stand_in_the_details(full: Page) -> None:
    report = REPORTS["full"]
    assert len(full.named("details")) == 3  # the workings of the shots, the layers, the recipe
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
    _, command, recipe, calibration = [data for inside, data in full.texts if inside == "code"]
    assert command == "llm-surgeon prune demo --sparsity 0.5 --shots 2"
    assert PruneConfig.from_mapping(yaml.safe_load(recipe)) == PruneConfig.from_mapping(REPORTS["full"].config)
    assert "layers\\.0\\..*" in recipe
    assert "shots: 2" in recipe
    assert calibration == f"source: demo:en\nsha256: {'ab' * 32}"
    assert "2.13.0" in full.text("dd").split("\n")


def test_loading_stands_at_the_top(full: Page) -> None:
    loading = next(data for inside, data in full.texts if inside == "code")
    ast.parse(loading)
    assert loading.splitlines()[:3] == loading_lines(REPORTS["full"], "'out'")
    assert page_text("full").index("from_pretrained") < page_text("full").index("<nav")
    assert "from_pretrained" not in page_text("minimal")


@pytest.mark.parametrize("name", ["one shot", "hostile"])
def test_one_shot_has_a_table_and_no_curve(name: str) -> None:
    assert curves_svg(REPORTS[name]) is None
    assert "Line charts" not in page_text(name)
    page = Page(page_text(name))
    cells = [data for inside, data in page.texts if inside in ("th", "td")]
    place = cells.index("perplexity", cells.index("before"))
    assert cells[place : place + 3] == ["perplexity", "15.91", "16.00"]
    if name == "one shot":
        place = cells.index("loss of the stage gates (nats per token)")
        assert cells[place + 1 : place + 3] == ["3.4567", "3.3219"]


def test_several_shots_have_a_curve(full: Page) -> None:
    assert "Line charts: perplexity and calibration loss by size kept" in full.attributes("aria-label")


def test_figures_take_the_colours_of_the_page(page: Page) -> None:
    drawn = " ".join(attributes.get("style") or "" for tag, attributes in page.tags if tag not in ("p", "th", "td"))
    assert not [colour for colour in VARIABLES if colour.lower() in drawn.lower()]
    assert not re.findall(r"(?:fill|stroke): (?:#000000|#ffffff|black|white)", drawn)
    css = page.text("style")
    light, dark = css.split("@media screen and (prefers-color-scheme: dark)")
    dark = dark[: dark.index("} }")]
    names = {variable[4:-1] for variable in VARIABLES.values() if variable.startswith("var(")}
    assert set(re.findall(r"var\((--[a-z]+)\)", drawn)) <= names
    assert all(f"{name}:" in light for name in names)
    assert all(f"{name}:" in dark for name in names - {"--orange", "--yellow", "--grey"})


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
    changes = {"loss": float("nan"), "costs": costs, "perplexity": infinite}
    report = sample_report(shots=(shot(1, 0.5, None).model_copy(update=changes),), dense_perplexity=infinite)
    text = Page(report_page(report)).text()
    assert "The peaks of the phases were not measured." in text
    assert "inf \u2192 inf" in text
    assert "shot 1: threshold 0" in text


def test_at_most_six_histograms_are_shown_and_the_page_says_so() -> None:
    page = Page(page_text("many shots"))
    titles = [data for _, data in page.texts if "threshold 0.00123" in data]
    assert [int(title.split(":")[0].split()[1]) for title in titles] == [1, 9, 17, 24, 32, 40]
    assert "Shown are 6 of 40 shots" in page.text("figcaption")
    assert "Shown are" not in Page(report_page(full_report(6))).text()
