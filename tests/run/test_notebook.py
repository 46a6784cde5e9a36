"""The call of a notebook: options by name, texts in memory, progress, a summary, and a model that saves itself."""

import copy
import io
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

import llm_surgeon
from llm_surgeon import PruneConfig, prune
from llm_surgeon.errors import ConfigError, DataError
from llm_surgeon.session.given import as_recipe
from tiny import build, tokenizer, tokens

SMALL = {"samples": 8, "seq_len": 16, "eval_window": 32, "eval_tokens": 128, "precision": "float32", "preset": "fast"}
WORDS = [" ".join(f"w{(7 * i + j) % 50}" for j in range(60)) for i in range(40)]


def pruned(family="llama", **options):
    model = build(family)
    return model, prune(model, tokenizer(), texts=WORDS, sparsity=0.3, **SMALL, **options)


def reloaded(directory):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)


@torch.no_grad()
def logits(model):
    return model(tokens(2, 12)).logits


def test_a_call_with_texts_and_options_prunes_and_says_what_it_did(capsys):
    _, report = pruned(progress=True)
    assert "shot 1/1" in capsys.readouterr().err
    assert report.config["sparsity"] == 0.3
    assert report.calibration["source"].startswith("texts in memory")
    assert report.dense_perplexity.data == "texts in memory (held-out part)"
    assert "perplexity" in report.summary()
    assert report._repr_html_().startswith("<table")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "options",
    [{"structure": "rows-columns"}, {"structure": "neurons", "uniform": True, "round_to": 2}, {"structure": "2:4"}],
)
def test_save_pretrained_writes_what_loads(family, options, tmp_path):
    model = build(family)
    options = {**SMALL, "preset": "none", "sparsity": 0.3, **options}
    if options["structure"] == "2:4":
        del options["sparsity"]
    prune(model, tokenizer(), texts=WORDS, **options)
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(reloaded(tmp_path / "saved")), logits(model), rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_save_their_own_weights(tmp_path):
    model, _ = pruned(structure="neurons", round_to=2)
    for name, other in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            other.model.norm.weight.mul_(2)
        other.save_pretrained(tmp_path / name)
        torch.testing.assert_close(logits(reloaded(tmp_path / name)), logits(other), rtol=1e-5, atol=1e-5)


def test_settings_that_saving_cannot_keep_are_refused(tmp_path):
    model, _ = pruned()
    with pytest.raises(ConfigError, match="max_shard_size"):
        model.save_pretrained(tmp_path / "saved", max_shard_size="1MB")
    assert not (tmp_path / "saved").exists()


def test_options_go_before_the_recipe():
    config = PruneConfig.from_mapping({**SMALL, "sparsity": 0.2})
    report = prune(build("llama"), tokenizer(), config, texts=WORDS, sparsity=0.3)
    assert report.config["sparsity"] == 0.3
    assert report.config["seq_len"] == 16
    assert config.sparsity == 0.2


@pytest.mark.parametrize("options", [{"structure": "unstructured"}, {"method": "wanda"}, {"preset": "none"}])
def test_options_replace_what_the_preset_of_a_recipe_brings(options):
    given = PruneConfig(sparsity=0.2, samples=4)
    assert as_recipe(given, options) == PruneConfig.from_mapping({"sparsity": 0.2, "samples": 4, **options})


def test_options_that_a_recipe_names_stay():
    given = PruneConfig(sparsity=0.2, gate_steps=1, shots=2)
    assert (as_recipe(given, {"seed": 1}).gate_steps, as_recipe(given, {"preset": "none"}).shots) == (1, 2)


def test_the_same_texts_from_a_file_give_the_same_model(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(f'{{"text": "{text}"}}' for text in WORDS), encoding="utf8")
    model, _ = pruned()
    other = build("llama")
    prune(other, tokenizer(), calibration=str(path), sparsity=0.3, **SMALL)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"texts": "one text"}, DataError, "list of strings"),
        ({"texts": []}, DataError, "no text"),
        ({"texts": [1, 2]}, DataError, "list of strings"),
        ({"texts": WORDS, "calibration": "demo"}, ConfigError, "one of the two"),
        ({"texts": WORDS, "sparsty": 0.2}, ConfigError, "did you mean sparsity"),
        ({"texts": WORDS, "progress": "yes"}, ConfigError, "progress=True"),
        ({"config": 0.2}, ConfigError, "sparsity=0.2"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_is_touched(given, error, words):
    model = build("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=words):
        prune(model, tokenizer(), **{**SMALL, **given})
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_displays_of_progress_are_public():
    from rich.console import Console

    stream = io.StringIO()
    prune(
        build("llama"),
        tokenizer(),
        texts=WORDS,
        progress=llm_surgeon.RichProgress(Console(file=stream)),
        **{**SMALL, "sparsity": 0.3},
    )
    assert "curvature" in stream.getvalue()
