"""What a model has to be able to do for a run, found out before its weights are loaded."""

from __future__ import annotations

import logging

import pytest
import torch
from typer.testing import CliRunner

import tiny
from llm_surgeon.cli import app
from llm_surgeon.data.texts import prepare_texts
from llm_surgeon.errors import ConfigError, DataError
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.run import opening as opening_module
from llm_surgeon.session.preconditions import check_positions, check_tokens, warn_of_tokenizer, warn_of_unknown

LEARNED, ROTARY = ("gpt2", "opt"), ("llama", "gpt-neox", "phi3", "gemma3")


@pytest.mark.parametrize("family", LEARNED)
def test_learned_positions_end(family):
    settings = tiny.build(family).config
    check_positions(settings, {"seq_len": 128})
    with pytest.raises(ConfigError, match=r"eval_window is 129, .* learned 128 positions.*--eval-window 128"):
        check_positions(settings, {"seq_len": 128, "eval_window": 129})


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_positions_go_on_and_the_log_says_so(family, caplog):
    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        check_positions(tiny.build(family).config, {"seq_len": 128})
        assert not caplog.records
        check_positions(tiny.build(family).config, {"seq_len": 129})
    assert "trained with 128 positions" in caplog.text


@pytest.fixture
def learned(tmp_path):
    path = tmp_path / "opt"
    tiny.opt().save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("prune", "--seq-len"), ("prune", "--eval-window"), ("plan", "--seq-len"), ("plan", "--eval-window")),
        ("eval", "--window"),
    ],
)
def test_every_command_refuses_before_the_weights_are_loaded(
    learned, text_file, tmp_path, monkeypatch, command, option
):
    def load(*_, **__):
        raise AssertionError("the weights were loaded")

    if command in ("prune", "plan"):
        monkeypatch.setattr(opening_module, "loaded", load)
    text = ["--data", str(text_file)] if command == "eval" else ["--calibration", str(text_file), "--samples", "2"]
    if command != "eval" and option != "--seq-len":
        text += ["--seq-len", "16"]
    out = ["--out", str(tmp_path / "out")] if command == "prune" else []
    result = CliRunner().invoke(app, [command, str(learned), *text, *out, option, "200"])
    assert result.exit_code == 1
    assert "learned 128 positions" in " ".join(result.output.split())


def test_tokens_without_an_embedding_are_refused():
    settings = tiny.llama().config
    check_tokens(settings, [torch.tensor([0, 63])])
    with pytest.raises(DataError, match="tokens up to 64 of the text, and the model has embeddings for 64"):
        check_tokens(settings, [torch.tensor([0, 63]), torch.tensor([[64]])])


def test_a_tokenizer_that_knows_more_is_warned_of(caplog):
    knows_more = tiny.tokenizer()
    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        warn_of_tokenizer(tiny.llama().config, knows_more)
        assert not caplog.records
        knows_more.add_tokens(["w64"])
        warn_of_tokenizer(tiny.llama().config, knows_more)
    assert "knows 65 tokens, and the model has embeddings for 64" in caplog.text


@pytest.mark.parametrize("command", ["prune", "plan", "eval"])
def test_every_command_refuses_text_with_such_tokens(checkpoint, text_file, tmp_path, command):
    path = tmp_path / "model"
    tiny.build("llama").save_pretrained(path)
    knows_more = tiny.tokenizer()
    knows_more.add_tokens(["w64"])
    knows_more.save_pretrained(path)
    text = tmp_path / "beyond.txt"
    text.write_text(text_file.read_text().replace("w63", "w64"))
    options = {
        "prune": ["--out", str(tmp_path / "out"), "--calibration", str(text), "--samples", "4", "--seq-len", "16"],
        "plan": ["--calibration", str(text), "--samples", "64", "--seq-len", "16", "--eval-window", "32"],
        "eval": ["--data", str(text), "--window", "32"],
    }[command]
    result = CliRunner().invoke(app, [command, str(path), *options, *(["--eval-window", "32"] * (command == "prune"))])
    assert result.exit_code == 1
    assert "embeddings for 64" in " ".join(result.output.split())


def test_text_that_the_tokenizer_does_not_know_is_warned_of(text_file, caplog):
    texts = prepare_texts(
        tiny.tokenizer(), PruneConfig(calibration=str(text_file), samples=4, seq_len=16, eval_window=32)
    )
    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        warn_of_unknown(tiny.tokenizer(), texts)
        assert not caplog.records
        text_file.write_text("hello world " * 5_000)
        texts = prepare_texts(
            tiny.tokenizer(), PruneConfig(calibration=str(text_file), samples=4, seq_len=16, eval_window=32)
        )
        warn_of_unknown(tiny.tokenizer(), texts)
    assert "100 % of the calibration tokens are 'w0'" in caplog.text


def test_a_tokenizer_that_knows_every_text_is_not_warned_of(text_file, caplog):
    """Byte-level tokenizers, as those of Llama 3 and Qwen, have no token for what they do not know."""
    bytewise = tiny.tokenizer()
    bytewise.unk_token = None
    texts = prepare_texts(bytewise, PruneConfig(calibration=str(text_file), samples=4, seq_len=16, eval_window=32))
    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        warn_of_unknown(bytewise, texts)
    assert bytewise.unk_token_id is None
    assert not caplog.records
