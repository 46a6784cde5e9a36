import pytest

from evaluation.own_tasks import LAST_WORD, measure, needs_lm_eval, read_samples, write_code, write_task

pytestmark = needs_lm_eval


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ({"dataset_kwargs": {"data_files": {"test": ["data/*.jsonl"]}}}, "data/*.jsonl"),
        ({"dataset_kwargs": {"data_files": "data/questions.jsonl"}}, "data/questions.jsonl"),
        ({"dataset_kwargs": {"data_dir": "data"}}, "data"),
        ({"dataset_path": "./data", "dataset_kwargs": {}}, "data"),
        ({"dataset_kwargs": {}}, None),
    ],
)
def test_missing_local_data_is_named_with_its_place(own_tasks, tmp_path, monkeypatch, unreachable, source, missing):
    """There is such data in the working directory, which is not where it is looked for."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    (elsewhere / "data" / "questions.jsonl").write_text('{"text": "w1 w2"}\n', encoding="utf8")
    monkeypatch.chdir(elsewhere)
    write_task(tmp_path, "lost", [], LAST_WORD | source)
    (failure,) = measure(["lost"], tmp_path).failures
    assert (f"{tmp_path / missing} does not exist" if missing else "names no file") in failure.cause
    assert f"in {tmp_path / 'lost.yaml'}" in failure.remedy
    assert "network" not in failure.cause + failure.remedy
    assert unreachable == []


def test_an_unreadable_data_file_is_not_laid_on_the_network(own_tasks, tmp_path):
    write_task(tmp_path, "broken", [], LAST_WORD)
    (tmp_path / "broken.jsonl").write_text('{"text": "w1 w2"\n', encoding="utf8")
    (failure,) = measure(["broken"], tmp_path).failures
    assert f"{tmp_path / 'broken.jsonl'}" in failure.cause
    assert "cannot be read" in failure.cause
    assert "JSON" in failure.cause
    assert "network" not in failure.remedy


def test_a_file_that_code_misses_is_named_and_no_network_asked_for(unreachable, tmp_path):
    missing = tmp_path / "data" / "questions.jsonl"
    write_code(tmp_path, "misses", f"datasets.load_dataset('json', data_files={str(missing)!r})")
    (failure,) = measure(["misses"], tmp_path).failures
    assert "A file that the task misses needs does not exist" in failure.cause
    assert str(missing) in failure.cause
    assert "misses.yaml" in failure.remedy
    assert "network" not in failure.cause + failure.remedy
    assert unreachable == []


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("task: odd\nno_such_key: 3\n", "no_such_key"),
        ("task: odd\noutput_type: guess\n", "guess"),
        ("task: odd\ncustom_dataset: !function missing_module_x.make\n", "missing_module_x"),
        ("task: odd\nmetric_list: acc\n", "metric_list"),
        ("task: odd\ndataset_kwargs: data.jsonl\ndataset_path: json\n", "data.jsonl"),
    ],
)
def test_a_task_file_that_makes_no_sense_is_a_failure_of_this_task(tmp_path, unreachable, text, cause):
    (tmp_path / "odd.yaml").write_text(text, encoding="utf8")
    (failure,) = measure(["odd"], tmp_path).failures
    assert cause in failure.cause
    assert "odd.yaml" in failure.remedy


def test_code_that_the_model_writes_is_not_run(own_tasks, tmp_path):
    write_task(tmp_path, "unsafe", read_samples(own_tasks, "last_word"), LAST_WORD | {"unsafe_code": True})
    (failure,) = measure(["unsafe"], tmp_path).failures
    assert "the code that the model writes" in failure.cause
