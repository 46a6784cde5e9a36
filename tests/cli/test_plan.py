import json

import pytest
from typer.testing import CliRunner

from llm_surgeon.cli import app
from llm_surgeon.cli.options import config_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.wording import flag
from llm_surgeon.records import Plan

runner = CliRunner()
SMALL = [
    "--preset",
    "none",
    "--samples",
    "8",
    "--seq-len",
    "32",
    "--eval-window",
    "64",
    "--eval-tokens",
    "256",
    "--shots",
    "1",
]


@pytest.fixture
def plan(checkpoint, text_file):
    return lambda *more: runner.invoke(
        app, ["plan", str(checkpoint), "--calibration", str(text_file), "--device", "cpu", *SMALL, *more]
    )


def test_a_plan_is_printed_and_written(plan, tmp_path):
    out = tmp_path / "plan.json"
    done = plan("--sparsity", "0.2", "--out", str(out))
    assert done.exit_code == 0, done.output
    for words in ("gate_proj", "weight files", "curvature", "whole run", "trust_remote_code", "disk needed"):
        assert words in done.output
    assert max(len(line) for line in done.output.splitlines()) <= 100
    record = Plan.model_validate(json.loads(out.read_text()))
    assert record.size.prunable == round(0.8 * record.dense_size.prunable)


def test_a_file_that_exists_is_kept(plan, tmp_path):
    out = tmp_path / "plan.json"
    out.write_text("mine")
    done = plan("--out", str(out))
    assert done.exit_code == 1
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "sparsity"),
        (["--structure", "diagonals"], "structure"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--recipe", "missing.yaml"], "missing.yaml"),
        (["--calibration", "missing.txt"], "missing.txt"),
        (["--samples", "100000"], "tokens"),
    ],
)
def test_mistakes_are_messages(plan, arguments, message):
    done = plan(*arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("command", ["plan", "prune"])
def test_every_key_of_the_recipe_is_an_option(command):
    done = runner.invoke(app, [command, "--help-all"], env={"COLUMNS": "200", "TERM": "dumb"})
    for name in PruneConfig.model_fields:
        assert f"{flag(name)} " in done.output


def test_the_command_line_overrides_the_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 0.3\nshots: 3\n")
    config = config_of({"recipe": recipe, "sparsity": 0.1, "shots": None})
    assert (config.sparsity, config.shots) == (0.1, 3)
