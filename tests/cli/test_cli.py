import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_surgeon.cli import app
from llm_surgeon.cli.prune import _duration
from llm_surgeon.comparison.cell_process import work

runner = CliRunner()
SMALL = ["--samples", "8", "--seq-len", "32", "--eval-window", "64", "--eval-tokens", "256", "--shots", "1"]


def flat(text):
    return " ".join(text.split())


def assert_the_lines_load(output, out):
    """Execute the three lines that load an export as they were printed."""
    lines = output.splitlines()
    first = lines.index("from transformers import AutoModelForCausalLM, AutoTokenizer")
    names = {}
    exec("\n".join(lines[first : first + 3]), names)
    report = json.loads((out / "report.json").read_text())
    # Zeros are stored, and not counted.
    zeros = report["config"]["structure"] == "unstructured"
    size = report["dense_size"] if zeros else report["shots"][-1]["size"]
    assert names["model"].num_parameters() == size["total"]
    assert names["tokenizer"]("w1 w2").input_ids == [1, 2]


def test_prune_then_eval(checkpoint, text_file, tmp_path):
    out = tmp_path / "out"
    done = runner.invoke(
        app, ["prune", str(checkpoint), "--out", str(out), "--calibration", str(text_file), "--sparsity", "0.2", *SMALL]
    )
    assert done.exit_code == 0, done.output
    assert "dense" in done.output
    assert str(out / "report.json") in done.output
    assert_the_lines_load(done.output, out)
    report = json.loads((out / "report.json").read_text())
    assert (report["config"]["sparsity"], report["config"]["preset"]) == (0.2, "best")
    gates = next(stage for stage in report["shots"][0]["stages"] if stage["name"] == "gates")
    figures = {figure["name"]: figure["value"] for figure in gates["figures"]}
    assert figures["loss after"] < figures["loss before them"]
    done = runner.invoke(app, ["eval", str(out), "--data", str(text_file), "--window", "32", "--tokens", "128"])
    assert done.exit_code == 0, done.output
    assert "124 tokens scored, window 32, stride 32" in flat(done.output)


def test_the_last_lines_say_how_long_it_took_how_large_it_is_and_where(checkpoint, text_file, tmp_path, monkeypatch):
    """In a directory of any name, and without code of the checkpoint where none is needed."""
    monkeypatch.chdir(tmp_path)
    out = Path("it's [my] :M: \u00e9")
    given = ["--out", out, "--calibration", text_file, "--structure", "unstructured", "--sparsity", "0.5", *SMALL]
    done = runner.invoke(app, ["prune", str(checkpoint), *map(str, given)])
    assert done.exit_code == 0, done.output
    assert re.search(r"\nThis took (\d+ min )?\d+ s\. Weights: [\d.]+ kB before, [\d.]+ kB after\.\n", done.output)
    assert f" It is {out.absolute()}, and these lines load it:\n" in done.output
    assert "trust_remote_code" not in done.output
    assert_the_lines_load(done.output, out)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "0 s"), (59.7, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (7384, "2 h 3 min 4 s")]
)
def test_a_duration_in_words(seconds, words):
    assert _duration(seconds) == words


def test_the_command_line_overrides_the_recipe(checkpoint, text_file, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"sparsity: 0.3\nseq-len: 32\nsamples: 4\nshots: 1\neval_window: 64\ncalibration: {text_file}\n")
    out = tmp_path / "out"
    done = runner.invoke(
        app, ["prune", str(checkpoint), "--out", str(out), "--recipe", str(recipe), "--sparsity", "0.1"]
    )
    assert done.exit_code == 0, done.output
    settings = json.loads((out / "report.json").read_text())["config"]
    assert (settings["sparsity"], settings["seq_len"], settings["samples"]) == (0.1, 32, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "1.5"], "sparsity"),
        (["--sparsity", "0"], "sparsity"),
        (["--structure", "diagonals"], "structure"),
        (["--shots", "0"], "shots"),
        (["--rank-by", "luck"], "rank_by"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--recipe", "missing.yaml"], "missing.yaml"),
        (["--calibration", "missing.txt"], "missing.txt"),
    ],
)
def test_mistakes_are_messages_not_stack_traces(checkpoint, tmp_path, arguments, message):
    done = runner.invoke(app, ["prune", str(checkpoint), "--out", str(tmp_path / "out"), *arguments])
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_a_message(tmp_path, text_file):
    done = runner.invoke(
        app, ["prune", str(tmp_path / "nothing"), "--out", str(tmp_path / "out"), "--calibration", str(text_file)]
    )
    assert done.exit_code == 1
    assert "There is no directory" in flat(done.output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int4"], "'int4'"),
        (["--precision", "int4"], "'int4'"),
        (["--data", "missing.txt"], "missing.txt"),
        (["--window", "32", "--stride", "64"], "skips tokens"),
        (["--tokens", "16"], "fewer than one window"),
    ],
)
def test_mistakes_of_eval_are_messages(checkpoint, text_file, arguments, message):
    done = runner.invoke(app, ["eval", str(checkpoint), "--data", str(text_file), "--window", "32", *arguments])
    assert done.exit_code == 1
    assert message in flat(done.output)
    assert "Traceback" not in done.output


def test_unknown_recipe_keys_are_named(checkpoint, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparcity: 0.3\n")
    done = runner.invoke(app, ["prune", str(checkpoint), "--out", str(tmp_path / "out"), "--recipe", str(recipe)])
    assert done.exit_code == 1
    assert "sparcity" in done.output


@pytest.fixture
def compare(checkpoint, text_file, tmp_path, monkeypatch):
    """Runs the command, with the work done in this process, which is quick."""
    monkeypatch.setattr("llm_surgeon.comparison.compare.work_in_process", work)
    given = ["--out", str(tmp_path / "out"), "--calibration", str(text_file), *SMALL]
    return lambda *arguments: runner.invoke(app, ["compare", str(checkpoint), *given, *arguments])


def test_compare_prints_the_table_and_where_it_is(compare, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 3\nvariants:\n  soft:\n    dampening-g: 0.5\n")
    settings = ["--structure", "unstructured", "--structure", "2:4", "--sparsity", "0.3", "--sparsity", "0.4"]
    done = compare("--methods", "surgeon,magnitude+one-shot", "--recipe", str(recipe), *settings, "--seed", "0")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    variants = ("surgeon", "magnitude+one-shot", "soft")
    settings = ("unstructured-0.3", "unstructured-0.4", "2-4")
    assert [cell["name"] for cell in record["cells"]] == [f"{v}@{s}" for s in settings for v in variants]
    assert [cell["recipe"]["dampening_g"] for cell in record["cells"][:3]] == [0.1, 0.1, 0.5]
    assert record["shared"]["seed"] == 0, "the command line overrides the recipe"
    assert record["shared"]["samples"] == 8
    for shown in ("unstructured, 30 %", "magnitude+one-shot", str(tmp_path / "out" / "comparison.md")):
        assert shown in flat(done.output)


def test_compare_tells_by_its_exit_status_that_a_cell_failed(compare, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("variants: {broken: {ignore: ['.']}}\n")
    done = compare("--methods", "magnitude", "--recipe", str(recipe))
    assert done.exit_code == 1
    assert "broken, unstructured, 50 %, failed: The patterns to ignore (.) match every layer" in flat(done.output)
    assert "Traceback" not in done.output
    cells = json.loads((tmp_path / "out" / "comparison.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["finished", "failed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to compare"),
        (["--methods", "surgeon,wander"], "method 'wander'"),
        (["--methods", "surgeon+magic"], "suffix 'magic'"),
        (["--methods", "surgeon", "--sparsity", "1.5"], "sparsity"),
        (["--methods", "surgeon", "--structure", "diagonals"], "structure"),
        (["--methods", "surgeon", "--evaluation", "none"], "evaluation"),
        (["--methods", "surgeon", "--recipe", "missing.yaml"], "missing.yaml"),
        (["--methods", "surgeon", "--evaluation", "missing.txt"], "missing.txt"),
        (["--methods", "surgeon", "--device", "cuda:99"], "cuda:99"),
    ],
)
def test_mistakes_of_compare_are_messages(compare, tmp_path, arguments, message):
    done = compare(*arguments)
    assert done.exit_code == 1
    assert message in flat(done.output)
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("variants: [surgeon]", "not a mapping of names"),
        ("variants: {surgeon: {}}", "'surgeon' is a variant of the recipe and one of --methods"),
        ("variants: {mine: {seed: 3}}", "'mine' sets seed"),
        ("structure: 2:x", "--structure"),
    ],
)
def test_mistakes_in_the_recipe_of_compare_are_messages(compare, tmp_path, recipe, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    done = compare("--methods", "surgeon", "--recipe", str(path))
    assert done.exit_code == 1
    assert message in flat(done.output)
    assert "Traceback" not in done.output


def test_an_interrupt_of_compare_says_that_it_can_go_on(compare, monkeypatch):
    def interrupt(_task):
        raise KeyboardInterrupt

    monkeypatch.setattr("llm_surgeon.comparison.compare.work_in_process", interrupt)
    done = compare("--methods", "surgeon")
    assert done.exit_code == 130
    assert "the same command goes on" in flat(done.output)


@pytest.mark.slow
def test_compare_in_processes_of_its_own(checkpoint, text_file, tmp_path):
    out = tmp_path / "out"
    how = ["--methods", "magnitude", "--structure", "unstructured", "--calibration", str(text_file), *SMALL]
    done = runner.invoke(app, ["compare", str(checkpoint), "--out", str(out), *how])
    assert done.exit_code == 0, done.output
    (cell,) = json.loads((out / "comparison.json").read_text())["cells"]
    assert cell["measures"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.usefixtures("real_python")
def test_help_is_quick_because_it_loads_neither_torch_nor_transformers():
    code = "import sys; import llm_surgeon.cli; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "llm_surgeon", "--help"], capture_output=True, text=True, check=True)
    assert "compare" in done.stdout


@pytest.fixture
def interrupted(checkpoint, text_file, tmp_path, monkeypatch):
    """Runs prune, interrupted at the call of a method."""

    def run(kind, name, *arguments, first=True):
        method = getattr(kind, name)

        def interrupting(*given):
            if not first:
                method(*given)
            raise KeyboardInterrupt

        command = ["prune", str(checkpoint), "--out", str(tmp_path / "out"), "--calibration", str(text_file), *SMALL]
        with monkeypatch.context() as patched:
            patched.setattr(kind, name, interrupting)
            done = runner.invoke(app, command)
        assert done.exit_code == 130
        return command, flat(done.output)

    return run


def test_an_interrupt_says_how_to_go_on(interrupted):
    from llm_surgeon.pruning.checkpoint import Checkpoints

    command, output = interrupted(Checkpoints, "write", first=False)
    assert "the same command continues after shot 1 (" in output
    assert output.endswith("interrupted; nothing is at --out yet, and the same command continues after shot 1")
    done = runner.invoke(app, [*command, "--seed", "1"])
    assert done.exit_code == 1
    assert "seed was 0 and is 1. Restore that to continue it" in flat(done.output)


def test_an_interrupt_without_a_checkpoint_says_that_the_command_begins_anew(interrupted, tmp_path):
    from llm_surgeon.session.marks import Marks

    _, output = interrupted(Marks, "write")
    assert output.endswith("interrupted; nothing is at --out yet, and the same command begins anew")
    assert not (tmp_path / "out.run").exists()


def test_an_interrupt_inside_a_shot_says_so(interrupted):
    from llm_surgeon.pruning.checkpoint import Checkpoints

    _, output = interrupted(Checkpoints, "write")
    assert output.endswith("interrupted; nothing is at --out yet, and the same command continues inside shot 1")


def test_an_interrupt_after_the_export_says_that_it_is_there(interrupted, tmp_path):
    from llm_surgeon.run.run_directory import RunDirectory

    _, output = interrupted(RunDirectory, "finish", first=False)
    assert output.endswith(flat(f"interrupted; the export at {tmp_path / 'out'} is complete"))
