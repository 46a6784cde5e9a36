from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from llm_surgeon.benchmark import isolated as alone
from llm_surgeon.cli import app

runner = CliRunner()
SMALL = ["--prompt", "6", "--generate", "2", "--repeats", "1"]


def flat(text):
    return " ".join(text.split())


@pytest.fixture
def bench(monkeypatch):
    """Runs the command, with all the work done in this process, which is quick."""
    monkeypatch.setattr("llm_surgeon.benchmark.measuring.measure_in_process", alone.measure)
    return lambda *arguments: runner.invoke(app, ["bench", *SMALL, *map(str, arguments)])


def test_it_prints_the_tables_and_writes_the_record(bench, checkpoint, tmp_path):
    out = tmp_path / "bench.json"
    done = bench(checkpoint, "--against", checkpoint, "--batch", "2", "--batch", "1", "--out", out)
    assert done.exit_code == 0, done.output
    for shown in ("tiny-llama (2)", "Peak memory", "Measured on", "alternating pairs with tiny-llama"):
        assert shown in flat(done.output)
    record = json.loads(out.read_text())
    assert [run["batch"] for run in record["runs"]] == [1, 2]
    assert record["command"].startswith("llm-surgeon")


def test_a_failure_is_shown_and_told_by_the_exit_status(bench, checkpoint, monkeypatch):
    def fail(*_):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

    monkeypatch.setattr("llm_surgeon.benchmark.pairs.compiled_run", fail)
    done = bench(checkpoint, "--batch", "1", "--compile")
    assert done.exit_code == 1
    assert "tiny-llama, batch 1, with torch.compile, failed: There is no C++ compiler." in flat(done.output)
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./missing"], "There is no directory './missing'"),
        (["--prompt", "200"], "exceed the model's 128 positions"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--dtype", "int4"], "'int4'"),
        (["--out", "."], "exists"),
        (["--out", "missing/bench.json"], "No file can be made"),
    ],
)
def test_mistakes_are_messages(bench, checkpoint, arguments, message):
    done = bench(checkpoint, *arguments)
    assert done.exit_code == 1
    assert message in flat(done.output)
    assert "Traceback" not in done.output


def test_no_model_is_a_mistake(bench):
    assert bench().exit_code == 2
