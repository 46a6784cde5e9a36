"""Exports and other checkpoints in further formats, after the run."""

import json

import pytest
from typer.testing import CliRunner

from choosing import feed_forwards, shrink
from llm_surgeon import export_as
from llm_surgeon.cli import app
from llm_surgeon.errors import ConfigError, OutputError, UnsupportedModelError
from llm_surgeon.export.save import save_model
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.trust import is_own_export
from llm_surgeon.pruning.shapes import Shapes
from llm_surgeon.recipe.config import PruneConfig
from tiny import build, tokenizer

FORMAT = "nemotron-nas"


@pytest.fixture
def uneven(tmp_path):
    """An export whose first block has fewer neurons."""
    model = build("llama")
    anatomy = examine(model, family_of("llama"))
    keep, part = anatomy.dense_masks(), feed_forwards(anatomy)[0]
    for rows in part.inputs:
        keep[rows.layer].rows[rows.index[:7]] = False
    keep[part.output.layer].columns[part.output.index[:7]] = False
    shrink(model, anatomy, keep)
    (tmp_path / "smaller").mkdir()
    save_model(model, tokenizer(), anatomy, keep, tmp_path / "smaller")
    return tmp_path / "smaller"


def test_the_files_stand_in_the_export_which_is_trusted_as_before(uneven):
    (record,) = export_as(uneven, FORMAT)
    assert record.directory == FORMAT
    entries = json.loads((uneven / FORMAT / "config.json").read_text())
    assert [block["ffn"]["intermediate_size"] for block in entries["block_configs"]] == [33, 40]
    assert is_own_export(uneven)
    assert not [path for path in uneven.rglob("*") if "partial" in path.name]


def test_code_that_was_changed_is_not_trusted(uneven):
    export_as(uneven, [FORMAT])
    file = next((uneven / FORMAT).glob("*.py"))
    file.write_text(file.read_text() + "\nprint('boo')\n")
    assert not is_own_export(uneven)


def test_what_is_there_is_not_overwritten(uneven, tmp_path):
    export_as(uneven, FORMAT, tmp_path / "other")
    before = (tmp_path / "other" / FORMAT / "config.json").stat().st_mtime_ns
    with pytest.raises(OutputError, match="is there already"):
        export_as(uneven, FORMAT, tmp_path / "other")
    assert (tmp_path / "other" / FORMAT / "config.json").stat().st_mtime_ns == before
    assert not (uneven / FORMAT).exists()


def test_dense_checkpoints_are_written_too(checkpoint, tmp_path):
    (record,) = export_as(checkpoint, FORMAT, tmp_path / "out", dtype="bfloat16")
    parameters = sum(parameter.numel() for parameter in build("llama").parameters())
    assert 2 * parameters <= record.weight_bytes < 2 * parameters + 16_000


def test_wrong_calls_are_refused_before_the_weights_are_read(uneven, tmp_path, monkeypatch):
    def read(*_):
        raise AssertionError("the weights are read")

    monkeypatch.setattr("llm_surgeon.run.convert.load_model", read)
    for formats, words in ((["gguff"], "not known"), (["hf"], "in the format hf already"), ([], "No format")):
        with pytest.raises(ConfigError, match=words):
            export_as(uneven, formats)
    with pytest.raises(ConfigError, match="There is no directory"):
        export_as("demo", FORMAT)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UnsupportedModelError, match="t5"):
        export_as(tmp_path / "strange", FORMAT)


def test_a_format_that_cannot_say_the_model_leaves_nothing_behind(tmp_path):
    model = build("llama")
    anatomy = examine(model, family_of("llama"))
    recipe = PruneConfig.from_mapping({"structure": "rows-columns", "sparsity": 0.3})
    keep = Shapes(recipe, anatomy).random_masks(0.3, seed=1)
    shrink(model, anatomy, keep)
    (tmp_path / "gaps").mkdir()
    save_model(model, tokenizer(), anatomy, keep, tmp_path / "gaps")
    with pytest.raises(ConfigError, match="no matrices without some") as refused:
        export_as(tmp_path / "gaps", FORMAT)
    assert "--structure neurons+heads" in refused.value.remedy
    assert not [path for path in (tmp_path / "gaps").iterdir() if FORMAT in path.name]
    opt = build("opt")
    (tmp_path / "opt").mkdir()
    opt.save_pretrained(tmp_path / "opt")
    tokenizer().save_pretrained(tmp_path / "opt")
    with pytest.raises(ConfigError, match="not for opt"):
        export_as(tmp_path / "opt", FORMAT)
    assert not [path for path in (tmp_path / "opt").iterdir() if FORMAT in path.name]


def test_the_command_says_what_was_written_and_how_to_load_it(uneven):
    result = CliRunner().invoke(app, ["export", str(uneven), "--format", FORMAT])
    assert result.exit_code == 0, result.output
    assert "from vllm import LLM" in result.output
    again = CliRunner().invoke(app, ["export", str(uneven), "--format", FORMAT])
    assert again.exit_code == 1
    assert "is there already" in " ".join(again.output.split())
