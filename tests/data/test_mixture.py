"""Several texts in a run: shares of the sequences, held-out parts, and perplexity of each."""

import json
import math

import pytest
import torch
import yaml
from typer.testing import CliRunner

from llm_surgeon import PruneConfig, prune_checkpoint
from llm_surgeon.cli import app
from llm_surgeon.data.texts import corpus_of, prepare_texts
from llm_surgeon.data.tokens import CalibrationTokens, mixed
from llm_surgeon.data.windows import EvaluationText, joined
from llm_surgeon.errors import ConfigError, DataError
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.recipe.sources import sources_of
from llm_surgeon.report.publish import recipe_without_paths, without_paths
from quick import without_what_has_other_tests
from tiny import build, tokenizer, tokens

# Two texts of words that the other does not have.
LOW, HIGH = range(10, 40), range(50, 80)


def written(path, words, count=6000):
    words = list(words)
    path.write_text(" ".join(f"w{words[number * 7 % len(words)]}" for number in range(count)))
    return str(path)


@pytest.fixture
def texts(tmp_path):
    return written(tmp_path / "low.txt", LOW), written(tmp_path / "high.txt", HIGH)


def recipe(**options):
    return PruneConfig(**{"samples": 10, "seq_len": 16, "eval_window": 32, "eval_tokens": 320} | options)


def is_of(ids: torch.Tensor, words: range) -> torch.Tensor:
    known = set(tokenizer()(" ".join(f"w{word}" for word in words)).input_ids)
    return torch.tensor([all(int(token) in known for token in row) for row in ids])


def test_each_text_has_its_share_of_the_sequences(texts):
    low, high = texts
    found = prepare_texts(tokenizer(), recipe(calibration=[f"{low}:0.7", f"{high}:0.3"]))
    ids = found.calibration.input_ids
    assert (int(is_of(ids, LOW).sum()), int(is_of(ids, HIGH).sum())) == (7, 3)
    assert [text["samples"] for text in found.calibration.provenance["texts"]] == [7, 3]
    json.dumps(found.calibration.provenance)
    windows = found.evaluation.tokens.view(-1, 32)
    names = [f"{low} (held-out part)", f"{high} (held-out part)"]
    assert found.evaluation.sources == ((names[0], 7, pytest.approx(0.7)), (names[1], 3, pytest.approx(0.3)))
    assert (int(is_of(windows, LOW).sum()), int(is_of(windows, HIGH).sum())) == (7, 3)


def test_the_sequences_of_a_text_are_those_that_it_gives_alone(texts):
    low, high = texts
    together = prepare_texts(tokenizer(), recipe(calibration=[low, high])).calibration.input_ids
    alone = prepare_texts(tokenizer(), recipe(calibration=low, samples=5)).calibration.input_ids
    assert torch.equal(together[is_of(together, LOW)], alone)


@pytest.mark.parametrize("counts", [(8, 8), (7, 3), (9, 5, 2), (1, 1), (31, 1)])
def test_halves_and_consecutive_parts_have_every_text(counts):
    made = [
        CalibrationTokens(torch.full((count, 2), text), None, provenance(count)) for text, count in enumerate(counts)
    ]
    order = mixed(made, [0.0] * len(counts)).input_ids[:, 0]
    assert order.bincount().tolist() == list(counts)
    for text, count in enumerate(counts):
        for part in (order[::2], order[1::2], order[: len(order) // 2], order[len(order) // 2 :]):
            assert abs(int((part == text).sum()) - count / 2) <= 1.5


def provenance(samples):
    return dict.fromkeys(("seq_len", "windows_per_sample", "seed", "bos", "sampling")) | {"samples": samples}


def test_held_out_parts_are_of_the_texts_that_are_named_twice(texts):
    low, high = texts
    found = prepare_texts(tokenizer(), recipe(calibration=[low, high], evaluation=low))
    assert found.evaluation.name == f"{low} (held-out part)"
    assert found.evaluation.sources == ()
    sources = [text["source"] for text in found.calibration.provenance["texts"]]
    assert "characters 1-" in sources[0]
    assert sources[1] == high


def test_a_text_in_memory_beside_others_to_evaluate_on(texts):
    _, high = texts
    given = corpus_of([" ".join(f"w{word}" for word in LOW) for _ in range(40)])
    options = recipe(calibration="texts in memory", evaluation=["texts in memory", high])
    found = prepare_texts(tokenizer(), options, given)
    assert [name for name, *_ in found.evaluation.sources] == ["texts in memory (held-out part)", high]


def test_too_few_sequences_or_windows_for_a_share(texts):
    low, high = texts
    with pytest.raises(ConfigError, match=r"10 calibration sequences .* leave none for .*high"):
        prepare_texts(tokenizer(), recipe(calibration=[f"{low}:99", f"{high}:1"]))
    with pytest.raises(ConfigError, match=r"64 evaluation tokens .* leave none"):
        prepare_texts(tokenizer(), recipe(calibration=[f"{low}:9", f"{high}:1"], eval_tokens=64))


def test_a_missing_text_of_several_is_named(texts, tmp_path):
    with pytest.raises(DataError, match=r"gone\.txt"):
        prepare_texts(tokenizer(), recipe(calibration=[texts[0], str(tmp_path / "gone.txt")]))


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_of_each_text_is_that_of_the_text_alone(bos):
    model = build("llama")
    parts = [EvaluationText(tokens(1, n, 3 + n)[0], f"{n}", 16, 16, "float32", bos) for n in (70, 33)]
    both, alone = perplexity(model, joined(parts, [0.25, 0.75])), [perplexity(model, part) for part in parts]
    assert [(text.data, text.windows) for text in both.sources] == [("70", 4), ("33", 2)]
    for text, other in zip(both.sources, alone, strict=True):
        assert text.nll == pytest.approx(other.nll, rel=1e-6)
    # By the shares, and not by the windows, of which a short text has too few.
    assert both.nll == pytest.approx(0.25 * alone[0].nll + 0.75 * alone[1].nll, rel=1e-6)
    assert both.perplexity == pytest.approx(math.exp(both.nll))
    assert alone[0].sources == ()


def test_a_run_on_two_texts_says_the_perplexity_of_each(checkpoint, texts, tmp_path, monkeypatch):
    low, high = texts
    without_what_has_other_tests(monkeypatch)
    monkeypatch.setattr("sys.argv", ["llm-surgeon"])
    options = ["--samples", "8", "--seq-len", "16", "--eval-window", "32", "--eval-tokens", "320", "--device", "cpu"]
    mix = ["--calibration", f"{low}:3", "--calibration", f"{high}:1"]
    called = CliRunner().invoke(app, ["prune", str(checkpoint), "--out", str(tmp_path / "out"), *mix, *options])
    assert called.exit_code == 0, called.output
    said = " ".join(called.output.split())
    assert "Perplexity by text: low.txt (held-out part)" in said
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf8")
    assert "| perplexity on low.txt (held-out part) |" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "out" / "recipe.yaml").read_text(encoding="utf8")


def test_published_recipes_have_no_paths_of_any_text(checkpoint, texts, tmp_path):
    low, high = texts
    config = recipe(calibration=[f"{low}:3", f"{high}:1"], evaluation=[low, high], preset="none", device="cpu")
    report = prune_checkpoint(str(checkpoint), tmp_path / "out", config)
    published = without_paths(report)
    assert str(tmp_path) not in published.model_dump_json()
    assert published.config["calibration"] == ["low.txt:3", "high.txt:1"]
    assert str(tmp_path) not in recipe_without_paths(config)
    assert len(report.shots[-1].perplexity.sources) == 2


def test_texts_whose_names_are_alike_stay_apart_in_what_is_published(checkpoint, tmp_path, monkeypatch):
    without_what_has_other_tests(monkeypatch)
    for directory, words in (("a", LOW), ("b", HIGH)):
        (tmp_path / directory).mkdir()
        written(tmp_path / directory / "train.txt", words)
    config = recipe(calibration=[f"{tmp_path}/a/train.txt:3", f"{tmp_path}/b/train.txt:1"], preset="none", device="cpu")
    report = prune_checkpoint(str(checkpoint), tmp_path / "out", config)
    assert without_paths(report).config["calibration"] == ["a/train.txt:3", "b/train.txt:1"]
    assert "on b/train.txt (held-out part)" in report.summary()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf8")
    for name in ("a", "b"):
        assert f"| perplexity on {name}/train.txt (held-out part) |" in card


@pytest.mark.parametrize("name", ["none", "demo"])
def test_a_file_named_like_a_word_of_the_recipe_is_published_as_a_file(tmp_path, name):
    config = recipe(calibration=[f"{tmp_path}/{name}:3", "other.txt:1"])
    published = PruneConfig.from_mapping(yaml.safe_load(recipe_without_paths(config)))
    assert [source.text for source in sources_of(published.calibration)] == [f"{tmp_path.name}/{name}", "other.txt"]
