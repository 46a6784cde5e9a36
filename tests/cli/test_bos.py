"""Windows that begin with BOS, from the command line to the report: where the tokenizer puts one, or as asked."""

from __future__ import annotations

import json

import pytest
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

import quick
import tiny
from llm_surgeon.cli import app

SMALL = ["--samples", "4", "--seq-len", "16", "--eval-window", "32", "--eval-tokens", "320", "--preset", "none"]


@pytest.fixture
def begun(tmp_path):
    """A checkpoint whose tokenizer puts the token 64 before each text."""
    path = tmp_path / "model"
    words = tiny.tokenizer()
    words.add_special_tokens({"bos_token": "<bos>"})
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", words.bos_token_id)]
    )
    tiny.llama(vocab_size=tiny.VOCABULARY + 1).save_pretrained(path)
    words.save_pretrained(path)
    return path


@pytest.mark.parametrize(("bos", "with_it"), [(None, True), ("never", False)])
def test_it_is_said_wherever_a_perplexity_is(begun, text_file, tmp_path, monkeypatch, bos, with_it):
    quick.without_what_has_other_tests(monkeypatch)
    out, asked = tmp_path / "out", [] if bos is None else ["--bos", bos]
    done = CliRunner().invoke(
        app, ["prune", str(begun), "--out", str(out), "--calibration", str(text_file), "--shots", "1", *SMALL, *asked]
    )
    assert done.exit_code == 0, done.output
    report = json.loads((out / "report.json").read_text())
    assert report["calibration"]["bos"] == (tiny.VOCABULARY if with_it else None)
    assert report["shots"][-1]["perplexity"]["bos"] == with_it
    words = "each begun with the token that begins a text"
    assert (words in (out / "README.md").read_text()) == with_it
    assert (words in " ".join(done.output.split())) == with_it
    measured = CliRunner().invoke(app, ["eval", str(out), "--data", str(text_file), "--window", "32", *asked])
    assert measured.exit_code == 0, measured.output
    assert (words in " ".join(measured.output.split())) == with_it


def test_what_is_none_of_the_three_is_a_message(begun, text_file):
    done = CliRunner().invoke(app, ["eval", str(begun), "--data", str(text_file), "--window", "32", "--bos", "maybe"])
    assert done.exit_code == 1
    assert "--bos is 'maybe'" in done.output
