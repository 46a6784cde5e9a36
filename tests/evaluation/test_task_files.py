import re
from pathlib import Path

import pytest
import yaml

from evaluation.own_tasks import LAST_WORD, measure, needs_lm_eval, read_samples, write_task
from llm_surgeon.errors import ConfigError
from llm_surgeon.evaluation.tasks import find_tasks

pytestmark = needs_lm_eval


def test_a_task_named_twice_counts_once(own_tasks):
    assert list(find_tasks(["pick", " pick ", "last_word", ""], own_tasks)) == ["pick", "last_word"]


def test_names_close_to_an_unknown_one_are_suggested_and_stock_groups_taken_apart(few_published):
    readme = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "copa"]
    readme += ["lambada_openai", "wsc273"]
    assert list(find_tasks(readme)) == readme
    with pytest.raises(ConfigError, match=r"'helaswag' is not known.*: .*hellaswag"):
        find_tasks(["boolq", "helaswag"])
    names = list(find_tasks(["mmlu_abstract_algebra", "mmlu", "ai2_arc"]))
    assert len(names) == 59
    assert names[0] == "mmlu_abstract_algebra"
    # A tag.
    assert names[-2:] == ["arc_challenge", "arc_easy"]


def write_group(path, name, tasks, **settings):
    (path / f"{name}.yaml").write_text(yaml.safe_dump({"group": name, "task": tasks, **settings}), encoding="utf8")


@pytest.fixture
def grouped(own_tasks, tmp_path):
    """Tasks a, b and c, two of them with a tag."""
    for name, tag in (("a", None), ("b", "tagged"), ("c", "tagged")):
        write_task(tmp_path, name, read_samples(own_tasks, "last_word"), LAST_WORD | {"tag": tag})
    return tmp_path


@pytest.mark.parametrize(
    ("asked", "names"),
    [("all", "c a b"), ("a,all,b", "a c b"), ("tagged", "b c"), ("outer", "b c a"), ("one", "a")],
)
def test_a_group_stands_for_its_tasks_in_order_each_once(grouped, asked, names):
    write_group(grouped, "all", ["c", "a", "b", "a"])
    write_group(grouped, "one", "a")
    write_group(grouped, "outer", ["tagged", {"group": "inner", "task": ["one", {"task": "c"}]}])
    found = find_tasks(asked.split(","), grouped)
    assert list(found) == names.split()
    result = measure(found, limit=4)
    accuracies = [score.metrics["acc"].value for score in result.scores]
    assert len(accuracies) == len(names.split())
    assert result.mean == pytest.approx(sum(accuracies) / len(accuracies))


def test_a_group_gives_its_tasks_settings_and_may_define_some(grouped, prompts):
    (grouped / "data").mkdir()
    (grouped / "data" / "more.jsonl").write_text('{"text": "w7 w8"}\n', encoding="utf8")
    inline = yaml.safe_load((grouped / "a.yaml").read_text(encoding="utf8"))
    inline |= {"task": "own", "training_split": None, "dataset_kwargs": {"data_files": {"test": "data/more.jsonl"}}}
    write_group(grouped, "changed", [{"task": "a", "doc_to_text": "w9"}, "b", inline], description="w5 ")
    result = measure(["changed"], grouped, limit=1)
    assert [score.task for score in result.scores] == ["a", "b", "changed::own"]
    b = read_samples(grouped, "b")[0]["text"].rpartition(" ")[0]
    assert prompts == {"a": ["w5 w9"], "b": [f"w5 {b}"], "changed::own": ["w5 w7"]}
    with pytest.raises(ConfigError, match="'a' is asked for twice, with different settings"):
        find_tasks(["a", "changed"], grouped)


def test_paths_that_a_group_gives_begin_at_its_own_file(grouped, prompts):
    (grouped / "deeper").mkdir()
    (grouped / "deeper" / "other.jsonl").write_text('{"text": "w7 w8"}\n', encoding="utf8")
    data = {"dataset_kwargs": {"data_files": {"test": "other.jsonl"}}, "training_split": None}
    write_group(grouped / "deeper", "each", [{"task": "a", **data}])
    write_group(grouped / "deeper", "shared", ["b"], **data)
    result = measure(["each", "shared"], grouped)
    assert result.failures == ()
    assert prompts == {"a": ["w7"], "b": ["w7"]}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["a", "lots"], r"'lots', which the group 'bad' names, is not known"),
        ([], "has no list of tasks"),
        (["a", 3], "lists 3, which names no task"),
        ([{"num_fewshot": 3}], "names no task"),
        (["bad"], "contains itself"),
        (["around"], "contains itself"),
    ],
)
def test_a_group_that_makes_no_sense_is_a_message(grouped, few_published, tasks, message):
    write_group(grouped, "bad", tasks)
    write_group(grouped, "around", ["bad"])
    with pytest.raises(ConfigError, match=message):
        find_tasks(["bad"], grouped)


@pytest.mark.parametrize(
    ("text", "reason"),
    [("task: [a\n", "line 2"), ("- a\n- b\n", "Expected YAML dict"), ("include: gone.yaml\ntask: c\n", "gone.yaml")],
)
def test_a_file_that_cannot_be_read_is_named_if_a_task_is_not_found(own_tasks, tmp_path, few_published, text, reason):
    write_task(tmp_path, "good", read_samples(own_tasks, "last_word"), LAST_WORD)
    (tmp_path / "bad.yaml").write_text(text, encoding="utf8")
    assert list(find_tasks(["good"], tmp_path)) == ["good"]
    named = rf"'c' is not known, and the task file .*bad\.yaml cannot be read: .*{reason}"
    with pytest.raises(ConfigError, match=named):
        find_tasks(["c"], tmp_path)


@pytest.mark.parametrize("relative", [False, True])
def test_the_task_file_of_the_documentation_works_from_anywhere(tmp_path, monkeypatch, relative):
    text = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text(encoding="utf8")
    ((file, source),) = re.findall(r"`my-tasks/(\w+\.yaml)`:\n\n```yaml\n(.*?)```", text, flags=re.DOTALL)
    ((data, rows),) = re.findall(r"`my-tasks/(\w+\.jsonl)`:\n\n```json\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "my-tasks").mkdir()
    (tmp_path / "my-tasks" / file).write_text(source, encoding="utf8")
    (tmp_path / "my-tasks" / data).write_text(rows, encoding="utf8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    place = Path("../my-tasks") if relative else tmp_path / "my-tasks"
    (name,) = re.findall(r"--tasks (\w+) --tasks-path my-tasks", text)
    result = measure([name], place, shots=1)
    assert result.failures == ()
    assert result.scores[0].samples == len(rows.splitlines())
    assert set(result.scores[0].metrics) == {"acc", "acc_norm"}
