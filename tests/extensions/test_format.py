"""A format of one's own in every place of a run, and the contract that all formats keep."""

import importlib.util
import json
from pathlib import Path

import numpy
import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from extensions.format_contract import FormatContract
from extensions.npz import FILE, Npz
from extensions.runs import (
    SMALL,
    RecordedProgress,
    interrupted_after,
    planned_by_command,
    recipe,
    restored,
    write_text,
)
from llm_surgeon import prune, prune_checkpoint
from llm_surgeon.cli import app
from llm_surgeon.errors import ConfigError, ExportMismatchError
from llm_surgeon.export.formats import FORMATS, register_format
from llm_surgeon.recipe.formats import FORMATS as KNOWN
from llm_surgeon.records import PruneReport
from tiny import build, byte_tokenizer, tokenizer

EVEN = {"structure": "neurons", "uniform": True, "round_to": 4, "sparsity": 0.3}
NPZ = Npz()
engine = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is missing")


@pytest.fixture(scope="module", autouse=True)
def registered():
    with restored(FORMATS, KNOWN):
        register_format(NPZ, "arrays of NumPy")
        yield
    assert "npz" not in {*FORMATS, *KNOWN}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(checkpoint, text, tmp_path_factory):
    """A run that exports in both formats, this one named first."""
    out = tmp_path_factory.mktemp("run") / "out"
    return out, prune_checkpoint(str(checkpoint), out, recipe(text, formats=["npz", "hf"], export_shots=[1], **EVEN))


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="the name 'npz' is taken"):
        register_format(Npz(), "again")


def test_the_plan_names_what_loads_it_and_counts_its_bytes(checkpoint, text, tmp_path):
    words = ["--structure", "neurons", "--uniform", "--round-to", "4", "--sparsity", "0.3"]
    both, printed = planned_by_command(checkpoint, text, tmp_path / "both.json", *words, "--format=hf", "--format=npz")
    one, _ = planned_by_command(checkpoint, text, tmp_path / "one.json", *words, "--dtype", "bfloat16")
    own, _ = planned_by_command(checkpoint, text, tmp_path / "own.json", *words, "--dtype=bfloat16", "--format=npz")
    assert "Loads it: numpy" in printed
    assert [line.split()[0] for line in both.loaders] == ["transformers", "numpy,"]
    alone, _ = planned_by_command(checkpoint, text, tmp_path / "alone.json", *words)
    assert both.disk - alone.disk == 4 * alone.size.total
    assert both.weight_bytes == alone.weight_bytes == 4 * alone.size.total
    assert (one.weight_bytes, own.weight_bytes) == (2 * one.size.total, 4 * one.size.total)


def test_each_format_has_its_place_and_its_record(run):
    (
        out,
        report,
    ) = run
    with numpy.load(out / "npz" / FILE) as arrays:
        assert sum(array.size for array in arrays.values()) == report.shots[-1].size.total
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == report.shots[-1].size.total
    written = json.loads((out / "report.json").read_text())["export"]
    assert [form["name"] for form in written["formats"]] == ["npz", "hf"]
    npz, hf = PruneReport.model_validate_json((out / "report.json").read_text()).export.formats
    assert (npz.directory, hf.directory) == ("npz", "")
    assert npz.weight_bytes == (out / "npz" / FILE).stat().st_size
    assert 0 <= npz.max_logit_difference < 1e-4 * npz.logit_scale
    # The report's own figures are those of what from_pretrained loads, whichever is named first.
    assert report.export.weight_bytes == hf.weight_bytes != npz.weight_bytes
    page = (out / "report.html").read_text()
    assert "format npz" in page
    assert "a plain transformers class" in page
    assert "AutoModelForCausalLM" in (out / "README.md").read_text()
    assert report.speed is not None


def test_a_shot_on_the_way_has_both_formats(run):
    out, _ = run
    assert (out / "shot-1" / "npz" / FILE).exists()
    assert (out / "shot-1" / "config.json").exists()


def test_a_run_ended_after_a_shot_goes_on_to_the_same_arrays(run, checkpoint, text, tmp_path):
    whole, _ = run
    out, config = tmp_path / "out", recipe(text, formats=["npz", "hf"], export_shots=[1], **EVEN)
    interrupted_after(1, checkpoint, out, config)
    assert prune_checkpoint(str(checkpoint), out, config).continued == (1,)
    with numpy.load(out / "npz" / FILE) as found, numpy.load(whole / "npz" / FILE) as expected:
        assert found.files == expected.files
        assert all(numpy.array_equal(found[name], expected[name]) for name in found.files)


def test_a_format_that_its_engine_fails_at_costs_no_other(checkpoint, text, tmp_path, monkeypatch):
    def differs(*_):
        raise ExportMismatchError("The arrays are of another model.", "Please report this.")

    monkeypatch.setattr(Npz, "verify", differs)
    out = tmp_path / "out"
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    words = ["--structure=neurons", "--uniform", "--round-to=4", "--sparsity=0.3", "--format=hf", "--format=npz"]
    done = CliRunner().invoke(
        app, ["prune", str(checkpoint), "--out", str(out), "--calibration", str(text), *small, *words]
    )
    assert done.exit_code == 1, done.output
    assert "The arrays are of another model" in done.output
    assert "is complete" in " ".join(done.output.split())
    report = PruneReport.model_validate_json((out / "report.json").read_text())
    assert report.export.failures == ("The arrays are of another model.",)
    assert not (out / "npz").exists()
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == report.shots[-1].size.total
    assert "was left out" in (out / "report.html").read_text()
    assert "The format npz was left out" in " ".join(done.output.split())


def test_alone_it_is_the_whole_export_and_nothing_promises_transformers(checkpoint, text, tmp_path):
    out = tmp_path / "out"
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    words = ["--structure=neurons", "--uniform", "--round-to=4", "--sparsity=0.3", "--format=npz"]
    done = CliRunner().invoke(
        app, ["prune", str(checkpoint), "--out", str(out), "--calibration", str(text), *small, *words]
    )
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "kept_fraction.png", "npz", "recipe.yaml", "report.html", "report.json")
    ]
    report = PruneReport.model_validate_json((out / "report.json").read_text())
    assert report.export.weight_bytes == (out / "npz" / FILE).stat().st_size
    assert not report.export.pretrained
    assert report.speed is not None
    card, page = (out / "README.md").read_text(), (out / "report.html").read_text()
    for words in (card, page, done.output):
        assert "from_pretrained(" not in words
        assert "numpy.load(" in words
    assert "library_name" not in card
    assert "transformers class" not in page
    # The lines that the command prints load the arrays as they stand there.
    lines = done.output.splitlines()
    names = {}
    exec("\n".join(lines[(first := lines.index("import numpy")) : first + 2]), names)
    assert sum(array.size for array in names["arrays"].values()) == report.shots[-1].size.total


def test_what_it_cannot_hold_is_refused_before_any_work(checkpoint, text, tmp_path):
    progress, out = RecordedProgress(), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"npz has names .* plain model only.*--uniform"):
        prune_checkpoint(str(checkpoint), out, recipe(text, formats=["hf", "npz"]), progress=progress)
    with pytest.raises(ConfigError, match="npz has names"):
        prune(build("llama"), tokenizer(), recipe(text, formats=["npz"]), out=out, progress=progress)
    assert not progress.phases
    assert list(tmp_path.iterdir()) == []


def test_files_that_compute_something_else_are_no_export(checkpoint, text, tmp_path, monkeypatch):
    def write_too_much(self, exported, directory):
        numpy.savez(
            directory / FILE, **{name: 1.1 * w.detach().numpy() for name, w in exported.model.named_parameters()}
        )
        return True

    out, config = tmp_path / "out", recipe(text, formats=["npz"], **EVEN)
    with monkeypatch.context() as patch:
        patch.setattr(Npz, "write", write_too_much)
        with pytest.raises(ExportMismatchError, match="logits of a model with the arrays differ"):
            prune_checkpoint(str(checkpoint), out, config)
    assert not out.exists()
    assert not list(Path(f"{out}.run").rglob(FILE)), "what is kept are the checkpoints"
    assert prune_checkpoint(str(checkpoint), out, config).continued == (2,)


class TestHuggingFace(FormatContract):
    form = FORMATS["hf"]


class GGUFContract(FormatContract):
    holds = ("zeros", "equal widths")
    tokenizer = staticmethod(byte_tokenizer)


@engine
class TestGGUF(GGUFContract):
    form = FORMATS["gguf"]


@engine
class TestGGUFFloat32(GGUFContract):
    form = FORMATS["gguf-f32"]


@engine
class TestGGUFFloat16(GGUFContract):
    form = FORMATS["gguf-f16"]
    tolerance = 1e-2


@engine
class TestGGUFBFloat16(GGUFContract):
    form = FORMATS["gguf-bf16"]
    tolerance = 3e-2


@engine
class TestGGUFQ8(GGUFContract):
    form = FORMATS["gguf-q8_0"]
    tolerance = 3e-2


class TestNpz(FormatContract):
    form = NPZ
    holds = ("zeros", "equal widths")
