import json

import pytest
from typer.testing import CliRunner

from evaluation.own_tasks import (
    LAST_WORD,
    ended,
    flat,
    measure,
    needs_lm_eval,
    picked,
    read_samples,
    write_lost,
    write_task,
)
from llm_surgeon import load
from llm_surgeon.cli import app
from llm_surgeon.errors import ConfigError
from llm_surgeon.records import Evaluation, TaskScores

runner = CliRunner()


def test_without_lm_eval_the_extra_is_named_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = runner.invoke(app, ["eval", str(tmp_path / "no-such-model"), "--tasks", "boolq"])
    assert done.exit_code == 1
    assert 'pip install "llm-surgeon[tasks]"' in flat(done.output)
    assert "Traceback" not in done.output


@needs_lm_eval
def test_the_command_prints_and_writes_what_it_measured(export, own_tasks, tmp_path):
    out = tmp_path / "scores.json"
    options = ["--tasks", "pick,last_word,pick", "--tasks-path", str(own_tasks), "--precision", "float32"]
    done = runner.invoke(app, ["eval", str(export), *options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    model = load(export)[0]
    mean = (picked(model, own_tasks)[0] + ended(model, own_tasks)[1]) / 2
    assert f"mean {100 * mean:.2f} %" in flat(done.stdout)
    assert "acc over 2 of the 2 tasks" in flat(done.stdout)
    assert "tokens scored" not in done.stdout
    written = Evaluation.model_validate_json(out.read_text(encoding="utf8"))
    assert written.tasks.mean == pytest.approx(mean)
    assert written.perplexity is None


@needs_lm_eval
def test_the_command_keeps_results_and_ends_with_one_if_a_task_failed(checkpoint, own_tasks, text_file, tmp_path):
    write_task(tmp_path, "good", read_samples(own_tasks, "last_word"), LAST_WORD)
    write_lost(tmp_path)
    out = tmp_path / "scores.json"
    texts = ["--data", str(text_file), "--window", "32", "--tokens", "128"]
    options = ["--tasks", "good,lost", "--tasks-path", str(tmp_path), "--limit", "4", "--out", str(out)]
    done = runner.invoke(app, ["eval", str(checkpoint), *texts, *options])
    assert done.exit_code == 1
    assert "124 tokens scored" in flat(done.stdout)
    assert "acc over 1 of the 2 tasks" in flat(done.stdout)
    assert "lost failed" in flat(done.stdout)
    assert "only the first 4 samples" in flat(done.stdout).lower()
    assert "Traceback" not in done.output
    written = Evaluation.model_validate_json(out.read_text(encoding="utf8"))
    assert ([one.task for one in written.tasks.scores], written.perplexity.tokens) == (["good"], 124)


@needs_lm_eval
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", " , "], "No task is named"),
        (["--tasks", "pick", "--tasks-path", "missing"], "missing"),
        (["--limit", "3"], "no tasks"),
        (["--seed", "3"], "no tasks"),
        (["--apply-chat-template"], "no tasks"),
        (["--tasks", "pick", "--out", "missing/scores.json"], "No file can be made"),
        (["--tasks", "pick", "--out", "."], "exists"),
    ],
)
def test_mistakes_are_messages_before_the_model_is_loaded(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    done = runner.invoke(app, ["eval", str(tmp_path / "no-such-model"), *arguments])
    assert done.exit_code == 1
    assert message in flat(done.output)
    assert "Traceback" not in done.output


@needs_lm_eval
def test_each_failure_is_said_once(checkpoint, own_tasks, tmp_path):
    write_lost(tmp_path)
    done = runner.invoke(app, ["eval", str(checkpoint), "--tasks", "lost", "--tasks-path", str(tmp_path)])
    assert done.exit_code == 1
    assert flat(done.stderr).count("The data of the task lost is not there") == 1
    assert "does not exist" not in flat(done.stdout)
    assert done.stdout.count("lost") == done.stdout.count("failed") == 1


@needs_lm_eval
def test_without_a_chat_template_nothing_is_begun(checkpoint, own_tasks, text_file):
    with pytest.raises(ConfigError, match="no chat template"):
        measure(["unknown"], own_tasks, apply_chat_template=True)
    options = ["--tasks", "pick", "--tasks-path", str(own_tasks), "--apply-chat-template", "--data", str(text_file)]
    done = runner.invoke(app, ["eval", str(checkpoint), *options, "--window", "32", "--tokens", "128"])
    assert done.exit_code == 1
    assert "no chat template" in flat(done.stderr)
    assert "tokens" not in done.output.replace("tokenizer", "")


@needs_lm_eval
def test_the_seed_of_the_command_is_that_of_the_examples_and_in_the_json(checkpoint, own_tasks, tmp_path, prompts):
    def asked(seed):
        out = tmp_path / f"{seed}.json"
        options = ["--tasks", "pick", "--tasks-path", str(own_tasks), "--few-shot", "2", "--limit", "3"]
        options += [] if seed is None else ["--seed", str(seed)]
        done = runner.invoke(app, ["eval", str(checkpoint), *options, "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert f"seed {seed or 0}" in flat(done.stdout)
        assert json.loads(out.read_text(encoding="utf8"))["tasks"]["seed"] == (seed or 0)
        return prompts["pick"]

    assert asked(None) == asked(0) != asked(1)


def test_records_of_earlier_versions_are_read():
    score = {"task": "pick", "version": "1", "metrics": {}, "accuracy": None, "shots": 2}
    old = {"scores": [score | {"samples": 3, "samples_total": 4}], "failures": [], "mean": None, "limit": 3}
    read = TaskScores.model_validate(old | {"batch_size": 1, "seed": 0, "precision": "float32", "lm_eval": "0.4.13"})
    assert (read.chat_template, read.scores[0].examples, read.scores[0].examples_measured) == (False, 0, 0)
