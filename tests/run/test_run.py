import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import llm_surgeon
from llm_surgeon import PruneConfig, evaluate, load, prune, prune_checkpoint
from llm_surgeon.data.texts import prepare_texts
from llm_surgeon.errors import (
    DataError,
    DiskSpaceError,
    ExportMismatchError,
    NonFiniteError,
    OutputError,
    UnsupportedModelError,
)
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.export import hugging_face
from llm_surgeon.report.publish import without_paths
from llm_surgeon.run import opening as opening_module
from tiny import build, tokenizer

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 32,
    "eval_window": 64,
    "eval_tokens": 512,
    "shots": 2,
    "precision": "float32",
}


def config(text_file, **changes):
    return PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), **changes})


def test_end_to_end(checkpoint, text_file, tmp_path):
    """Prune a checkpoint, find everything promised in the directory, and load it again."""
    out = tmp_path / "new" / "pruned"
    report = prune_checkpoint(str(checkpoint), out, config(text_file, sparsity=0.4), command="llm-surgeon prune ...")
    names = {path.name for path in out.iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "modeling_pruned.py",
        "tokenizer.json",
        "generation_config.json",
        "recipe.yaml",
        "report.json",
        "README.md",
        "kept_fraction.png",
    } <= names
    assert [p.name for p in out.parent.iterdir()] == ["pruned"], "nothing may be left beside the export"
    assert len(report.shots) == 2
    final = report.shots[-1]
    assert 0.3 < final.sparsity <= 0.4
    assert final.size.prunable == sum(layer.rows * layer.columns for layer in report.layers)
    assert final.size.total < report.dense_size.total
    assert report.export is not None
    assert report.export.weight_bytes < report.export.dense_weight_bytes
    assert report.speed is not None
    assert report.memory.peak > report.memory.floor > 0

    assert json.loads((out / "report.json").read_text()) == without_paths(report).model_dump(mode="json")
    assert PruneConfig.from_mapping(yaml.safe_load((out / "recipe.yaml").read_text())) == config(
        text_file.name, batch_size=8, curvature="kfac", round_to=1, min_width=0.0, sparsity=0.4
    )
    published = [path for path in out.rglob("*") if path.suffix in (".json", ".yaml", ".md", ".html", ".py")]
    assert not [path.name for path in published if str(tmp_path.parent) in path.read_text(encoding="utf8")]
    model, reloaded_tokenizer = load(out, device="cpu")
    assert sum(p.numel() for p in model.parameters()) == final.size.total
    measured = evaluate(model, reloaded_tokenizer, str(text_file), window=64, max_tokens=512, precision="float32")
    assert measured.tokens == 8 * 63
    ids = reloaded_tokenizer("w1 w2 w3", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 6)


def test_the_report_measures_the_model_in_memory(text_file):
    model = build("llama")
    report = prune(model, tokenizer(), config(text_file, sparsity=0.3))
    assert report.dense_perplexity is not None
    text = prepare_texts(tokenizer(), config(text_file, sparsity=0.3)).evaluation
    assert text is not None
    now = perplexity(model, text).perplexity
    assert report.shots[-1].perplexity is not None
    assert now == pytest.approx(report.shots[-1].perplexity.perplexity, rel=1e-6)
    assert report.shots[-1].size.total == sum(p.numel() for p in model.parameters())


def test_calibration_and_evaluation_never_share_text(text_file):
    """Unless two texts are named, the last tenth is held out."""
    words = text_file.read_text().split()
    texts = prepare_texts(tokenizer(), config(text_file))
    held_out = [f"w{int(i)}" for i in texts.evaluation.tokens]
    assert " ".join(held_out) in " ".join(words[-len(words) // 10 - 50 :])
    assert texts.calibration.provenance["tokens_available"] < 0.92 * len(words)
    assert prepare_texts(tokenizer(), config(text_file, evaluation="none")).evaluation is None


def test_same_seed_same_result(text_file):
    first, second = build("llama"), build("llama")
    for model in (first, second):
        prune(model, tokenizer(), config(text_file, sparsity=0.3))
    for (name, x), (_, y) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_are_pruned_and_exported_in_their_type(checkpoint, text_file, tmp_path, dtype):
    out = tmp_path / "half"
    prune_checkpoint(str(checkpoint), out, config(text_file, sparsity=0.2, shots=1, dtype=dtype))
    model, _ = load(out, device="cpu")
    assert model.dtype == getattr(torch, dtype)


def test_rank_by_changes_what_is_removed(text_file):
    masks = []
    for rank_by in ("cost-per-weight", "cost"):
        report = prune(build("llama"), tokenizer(), config(text_file, sparsity=0.4, rank_by=rank_by, shots=1))
        masks.append([(layer.rows, layer.columns) for layer in report.layers])
    assert masks[0] != masks[1]


def test_correlated_updates_do_better_than_none(text_file):
    """The loss on the calibration text rises less than by cutting the same structures without an update."""
    from llm_surgeon.mathematics import fisher

    updated = prune(build("llama"), tokenizer(), config(text_file, sparsity=0.3, shots=1, evaluation=str(text_file)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fisher, "remove_rows", lambda w, g, r, kept, *_: w[kept])
        patch.setattr(fisher, "remove_columns", lambda w, a, c, kept, *_: w[:, kept])
        cut = prune(build("llama"), tokenizer(), config(text_file, sparsity=0.3, shots=1, evaluation=str(text_file)))
    assert updated.shots[0].size == cut.shots[0].size
    rise = [report.shots[0].perplexity.nll - report.dense_perplexity.nll for report in (updated, cut)]
    assert rise[0] < rise[1]


class TestRefusals:
    """Each is raised before any expensive work and leaves nothing behind."""

    def refuse(self, error, match, checkpoint, out, settings):
        with pytest.raises(error, match=match):
            prune_checkpoint(str(checkpoint), out, settings)

    def test_output_not_empty(self, checkpoint, text_file, tmp_path):
        out = tmp_path / "full"
        out.mkdir()
        (out / "thesis.tex").write_text("irreplaceable")
        self.refuse(OutputError, "is not empty", checkpoint, out, config(text_file))
        assert (out / "thesis.tex").read_text() == "irreplaceable"

    def test_output_is_a_file(self, checkpoint, text_file):
        self.refuse(OutputError, "is a file", checkpoint, text_file, config(text_file))

    def test_too_few_tokens(self, checkpoint, text_file, tmp_path):
        settings = config(text_file, samples=1000)
        self.refuse(DataError, "1,000 samples of 32 tokens need 32,000", checkpoint, tmp_path / "out", settings)
        assert not (tmp_path / "out").exists()

    def test_text_too_short(self, checkpoint, tmp_path):
        (tmp_path / "short.txt").write_text("w1 w2\nw3 w4\n")
        settings = config(tmp_path / "short.txt")
        self.refuse(DataError, "too short to hold out", checkpoint, tmp_path / "out", settings)
        settings = config(tmp_path / "short.txt", evaluation="none")
        self.refuse(DataError, "has 4 tokens", checkpoint, tmp_path / "out", settings)

    def test_unreadable_text(self, checkpoint, tmp_path):
        self.refuse(DataError, "missing.txt", checkpoint, tmp_path / "out", config(tmp_path / "missing.txt"))

    def test_disk_full(self, checkpoint, text_file, tmp_path, monkeypatch):
        usage = type("Usage", (), {"free": 1000})()
        monkeypatch.setattr("llm_surgeon.system.files.shutil.disk_usage", lambda _path: usage)
        self.refuse(DiskSpaceError, "free", checkpoint, tmp_path / "out", config(text_file))

    def test_unsupported_architecture(self, checkpoint, text_file, tmp_path):
        other = tmp_path / "other"
        other.mkdir()
        settings = json.loads((checkpoint / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(settings | {"model_type": "mamba"}))
        self.refuse(UnsupportedModelError, "mamba", other, tmp_path / "out", config(text_file))

    def test_a_pruned_checkpoint(self, checkpoint, text_file, tmp_path):
        out = tmp_path / "once"
        prune_checkpoint(str(checkpoint), out, config(text_file, sparsity=0.2, shots=1))
        self.refuse(UnsupportedModelError, "already", out, tmp_path / "twice", config(text_file))


def test_weights_that_are_not_finite_are_an_error_and_leave_nothing(checkpoint, text_file, tmp_path, monkeypatch):
    def damaged(*args, **kwargs):
        model, anatomy = original(*args, **kwargs)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
        return model, anatomy

    original = opening_module.loaded
    monkeypatch.setattr(opening_module, "loaded", damaged)
    with pytest.raises(NonFiniteError):
        prune_checkpoint(str(checkpoint), tmp_path / "out", config(text_file))
    assert not (tmp_path / "out").exists()


def test_an_export_that_differs_is_an_error_and_leaves_nothing(checkpoint, text_file, tmp_path, monkeypatch):
    def sabotage(model, *args):
        form = original(model, *args)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        return form

    original = hugging_face.save_model
    monkeypatch.setattr(hugging_face, "save_model", sabotage)
    with pytest.raises(ExportMismatchError, match="differs"):
        prune_checkpoint(str(checkpoint), tmp_path / "out", config(text_file, shots=1))
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def test_an_export_that_needs_this_package_is_an_error(checkpoint, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "llm_surgeon.export.save.modeling_text",
        lambda _family, _form: "import llm_surgeon\nraise SystemError('loaded')\n",
    )
    with pytest.raises(ExportMismatchError, match="fresh process"):
        prune_checkpoint(str(checkpoint), tmp_path / "out", config(text_file, shots=1))


def test_an_export_is_never_taken_for_a_dense_model(checkpoint, text_file, tmp_path):
    """Without permission to run its code, transformers refuses instead of filling the gaps with random weights."""
    out = tmp_path / "out"
    prune_checkpoint(str(checkpoint), out, config(text_file, sparsity=0.2, shots=1))
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert llm_surgeon.__version__ == version("llm-surgeon")


def test_a_model_in_memory_can_be_exported(text_file, tmp_path):
    model, out = build("opt"), tmp_path / "out"
    report = prune(model, tokenizer(), config(text_file, sparsity=0.2, shots=1), out=out, source="my-opt")
    assert report.model == "my-opt"
    assert report.speed is None
    reloaded, _ = load(out, device="cpu")
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(ids).logits, model(ids).logits)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        prune(build("opt"), tokenizer(), config(text_file), out=tmp_path / "full")


def test_the_profile_divides_the_time_of_a_shot(checkpoint, text_file):
    report = prune(load(checkpoint)[0], tokenizer(), config(text_file, shots=1, evaluation="none"))
    shot = report.shots[0]
    assert {"model pass", "factor sums", "decomposition", "costs and selection", "update"} <= set(shot.profile)
    assert all(seconds > 0 for seconds in shot.profile.values())
    assert sum(shot.profile.values()) == pytest.approx(shot.seconds)
