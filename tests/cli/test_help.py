"""Help in two lengths, and options that are mistyped, removed or without effect."""

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from llm_surgeon.cli import app
from llm_surgeon.cli.options import COMMON, config_of
from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.groups import GROUPS
from llm_surgeon.recipe.wording import flag

runner = CliRunner()
COMMANDS = ("prune", "plan", "compare", "eval")


def shown(*arguments, columns="80"):
    done = runner.invoke(app, arguments, env={"COLUMNS": columns, "TERM": "dumb"})
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_on_a_screen_and_says_how_to_get_the_rest(command):
    output = shown(command, "--help")
    lines = output.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    assert "--help-all" in output
    assert "…" not in output
    assert output.count("╭") == 2, "arguments and options, no more panels"


def test_help_has_what_most_people_use_and_no_more():
    options = set(re.findall(r"^│ \*?\s*(--[a-z-]+)", shown("prune", "--help"), re.MULTILINE))
    assert options == {flag(name) for name in COMMON} | {"--out", "--help-all", "--help"}


def test_help_without_a_terminal_is_as_wide():
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "TERMINAL_WIDTH")}
    done = subprocess.run(
        [sys.executable, "-m", "llm_surgeon", "prune", "--help"], capture_output=True, text=True, check=True, env=env
    )
    lines = done.stdout.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_the_whole_help_has_more_than_the_short_one(command):
    short, whole = (set(re.findall(r"--[a-z-]+", shown(command, length))) for length in ("--help", "--help-all"))
    assert short < whole


@pytest.mark.parametrize("command", ["prune", "plan"])
def test_the_whole_help_is_in_groups(command):
    output = shown(command, "--help-all")
    places = [output.index(f"─ {group.title} ─") for group in GROUPS]
    assert places == sorted(places)


def test_the_short_help_says_the_defaults_of_the_recipe():
    said = 0
    for name, text in COMMON.items():
        found = re.search(r"\(default: (.*?)\)", text) or re.search(r"([\w-]+) \(default\)", text)
        if found:
            said += 1
            assert str(PruneConfig().resolved()[name]) == found[1]
    assert said >= 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparcity", "0.3"], "--sparsity"),
        (["--gate-setps", "3"], "--gate-steps"),
        (["--stages", "x"], "--stage"),
        (["--kronecker-iterations", "3"], "--kronecker-iterations was removed"),
        (["--eval-stride=3"], "--eval-stride was removed"),
    ],
)
def test_options_that_are_none_get_a_hint(tmp_path, arguments, message):
    done = runner.invoke(app, ["prune", "demo", "--out", str(tmp_path / "out"), *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "30%"], "did you mean 0.3?"),
        (["--sparsity", "half"], "--sparsity has to be a number (got the text 'half')"),
        (["--samples", "5.0"], "--samples has to be a whole number (got the text '5.0')"),
        (["--export-shots", "one"], "has to be a whole number (got the text 'one')"),
        (["--lora-rank", "4"], "lora_rank has no effect while lora is false"),
        (["--lora-rank", "16"], "lora_rank has no effect while lora is false"),
        (["--stage", "toy"], "--stage (stages in a recipe) has 'toy'"),
        (["--format", "hf", "--format", "toy"], "--format (formats in a recipe) has 'toy'"),
    ],
)
@pytest.mark.parametrize("command", ["prune", "plan"])
def test_values_that_cannot_be_are_answered_as_those_of_a_recipe(command, tmp_path, arguments, message):
    done = runner.invoke(app, [command, "demo", "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())


def test_compare_answers_a_percentage_alike(tmp_path):
    done = runner.invoke(
        app, ["compare", "demo", "--out", str(tmp_path / "out"), "--methods", "wanda", "--sparsity", "3%"]
    )
    assert done.exit_code == 1
    assert "did you mean 0.03?" in " ".join(done.output.split())


def test_only_what_is_typed_has_to_have_an_effect(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(PruneConfig().to_yaml())
    assert config_of({"recipe": recipe}).lora_rank == 16
    assert config_of({"recipe": recipe, "lora": True, "lora_rank": 16}).lora
    with pytest.raises(ConfigError, match="lora_rank has no effect"):
        config_of({"recipe": recipe, "lora_rank": 16})
