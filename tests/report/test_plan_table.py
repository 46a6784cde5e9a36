import io

from rich.console import Console

from llm_surgeon.recipe.quantity import duration
from llm_surgeon.records import LayerKind, Plan, PlannedPhase, Size
from llm_surgeon.report.page import report_page
from llm_surgeon.report.plan_table import compared, plan_tables
from report.test_table import sample_report

GIB = 2**30
PLAN = Plan(
    model="owner/model",
    family="llama",
    device="cuda:0",
    kinds=(LayerKind(kind="[q]_proj", layers=2, rows=10, columns=20),),
    dense_size=Size(prunable=400, total=1000),
    size=Size(prunable=200, total=800),
    dense_weight_bytes=4000,
    weight_bytes=3200,
    disk=5000,
    phases=(
        PlannedPhase(name="load", host={"weights": 9 * GIB}, device={"weights": GIB}, seconds=1, reports=False),
        PlannedPhase(name="curvature", host={"process": GIB}, device={"weights": GIB, "passes": GIB}, seconds=200),
        PlannedPhase(name="evaluation", host={"process": GIB}, device={"weights": GIB}, seconds=5),
    ),
    host_available=20 * GIB,
    device_available=4 * GIB,
    loaders=("transformers",),
)


def drawn(plan):
    console = Console(width=100, file=io.StringIO())
    console.print(plan_tables(plan))
    return console.file.getvalue()


def test_peaks_are_those_of_the_device_where_there_is_one():
    assert PLAN.host_peak == 9 * GIB
    assert (PLAN.device_peak, PLAN.peak) == (2 * GIB, 2 * GIB)
    assert PLAN.seconds == 206


def test_the_peak_to_compare_is_that_of_reported_phases():
    phases = tuple(phase.model_copy(update={"device": {}}) for phase in PLAN.phases)
    assert PLAN.model_copy(update={"phases": phases}).peak == GIB


def test_tables_fit_a_terminal_and_name_the_parts():
    text = drawn(PLAN)
    assert max(len(line) for line in text.splitlines()) <= 100
    for words in ("[q]_proj", "cuda:0", "passes 1.074 GB", "Loads it: transformers", "3 min", "whole run"):
        assert words in text


def test_predicted_stands_beside_measured():
    report = sample_report().model_copy(update={"plan": PLAN})
    rows = {row[0]: row for row in compared(report)}
    assert rows["peak memory"][1] == "2.147 GB"
    assert rows["peak memory"][3] == f"{2 * GIB / report.memory.peak:.2f}"
    assert rows["weight files"][1] == "3.200 kB"
    assert "Predicted and measured" in report_page(report)
    assert compared(sample_report()) == []
    assert "Nothing was predicted." in report_page(sample_report())


def test_time_is_said_in_a_fitting_unit():
    assert [duration(value) for value in (0.4, 99, 100, 5999, 7200)] == ["0 s", "99 s", "2 min", "100 min", "2.0 h"]
