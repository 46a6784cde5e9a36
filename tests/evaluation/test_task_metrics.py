import pytest
from rich.console import Console

from evaluation.own_tasks import PICK, mean_of, measure, needs_lm_eval, read_samples, write_task
from llm_surgeon.report.table import UNKNOWN
from llm_surgeon.report.task_table import task_table

pytestmark = needs_lm_eval


def test_what_enters_the_mean():
    from llm_surgeon.evaluation.task_metrics import accuracy_of

    assert accuracy_of(["acc_norm", "acc"]) == "acc"
    assert accuracy_of(["perplexity", "acc_norm"]) == "acc_norm"
    assert accuracy_of(["exact_match,strict-match", "exact_match,flexible-extract"]) == "exact_match,strict-match"
    assert accuracy_of(["word_perplexity", "accuracy_of_nothing"]) is None


@pytest.mark.parametrize(
    ("metrics", "cause"),
    [
        ([{"metric": "acuracy"}], "the metric 'acuracy'"),
        ([mean_of("acuracy")], "the metric 'acuracy'"),
        ([mean_of("acc"), mean_of("acuracy")], "the metric 'acuracy'"),
        ([{"aggregation": "mean"}], "an entry without a metric"),
        ([mean_of("acc") | {"aggregation": "meen"}], "the aggregation 'meen'"),
        ([mean_of("acc"), mean_of("bleu")], "'bleu', which is not measured for its output_type"),
        ([], "gives no number"),
        ([mean_of("bypass")], "gives no number"),
    ],
)
def test_a_metric_that_lm_eval_cannot_measure_is_a_failure(own_tasks, tmp_path, monkeypatch, metrics, cause):
    # A name that lm-eval does not know is looked for in the package evaluate, which would ask the network.
    monkeypatch.setattr("evaluate.load", {}.__getitem__)
    write_task(tmp_path, "wrong", read_samples(own_tasks, "pick"), PICK | {"metric_list": metrics})
    result = measure(["wrong"], tmp_path, limit=2)
    (failure,) = result.failures
    assert cause in failure.cause
    assert (result.scores, result.mean) == ((), None)


def test_numbers_that_are_no_accuracies_are_shown_as_they_are(own_tasks, tmp_path, capsys, caplog):
    (tmp_path / "measure.py").write_text(
        "def results(document, answers):\n    return {'margin': answers[0][0] - answers[1][0], 'word': 'w1'}\n"
        "def first(values):\n    return values[0]\n",
        encoding="utf8",
    )
    write_task(tmp_path, "margins", read_samples(own_tasks, "pick"), PICK, process_results="measure.results")
    with (tmp_path / "margins.yaml").open("a", encoding="utf8") as file:
        file.write("metric_list:\n- {metric: margin, aggregation: mean, higher_is_better: true}\n")
        file.write("- {metric: word, aggregation: !function measure.first, higher_is_better: true}\n")
    result = measure(["margins"], tmp_path)
    assert result.failures == ()
    assert list(result.scores[0].metrics) == ["margin"]
    assert "margins: the metric word is not a number" in caplog.text
    Console(width=100).print(task_table("tiny", result))
    shown = capsys.readouterr().out
    assert f"margin {result.scores[0].metrics['margin'].value:.4g}" in shown
    assert UNKNOWN not in shown
    assert "No mean" in shown
