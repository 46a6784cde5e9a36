"""Calibration windows and evaluation tokens, with a tokenizer of one word per token."""

from __future__ import annotations

import hashlib
import json
import logging
import random

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llm_surgeon.data.corpora import Corpus
from llm_surgeon.data.tokens import (
    CalibrationTokens,
    evaluation_tokens,
    first_token,
    sample_calibration,
    windows_with_bos,
)
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.errors import ConfigError, DataError

WORDS = 200


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Word ``wN`` is token N; the maximal length is short, so that long texts would cause a warning."""
    vocabulary = {f"w{number}": number for number in range(WORDS)} | {"?": WORDS}
    words = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", model_max_length=8)


@pytest.fixture
def corpus() -> Corpus:
    """Tokens 0 to 199 in order, in two documents."""
    words = [f"w{number}" for number in range(WORDS)]
    return Corpus((" ".join(words[:50]), " ".join(words[50:])), "words", "\n\n")


def test_windows_start_where_the_global_generator_would_put_them(tokenizer, corpus):
    random.seed(7)
    starts = random.sample(range(0, WORDS - 16), 5)
    tokens = sample_calibration(tokenizer, corpus, samples=5, seq_len=16, seed=7)
    assert tokens.input_ids.dtype == torch.int64
    assert tokens.input_ids.tolist() == [list(range(start, start + 16)) for start in starts]
    assert tokens.attention_mask is None
    assert (tokens.n_samples, tokens.seq_len, tokens.n_tokens) == (5, 16, 80)


def test_windows_of_a_sample_are_those_of_short_samples_one_behind_the_other(tokenizer, corpus):
    short = sample_calibration(tokenizer, corpus, samples=6, seq_len=8, seed=7)
    long = sample_calibration(tokenizer, corpus, samples=2, seq_len=24, seed=7, windows_per_sample=3)
    assert long.input_ids.tolist() == short.input_ids.view(2, 24).tolist()
    assert long.provenance["windows_per_sample"] == 3
    assert short.provenance["windows_per_sample"] == 1


def test_windows_of_a_sample_are_of_equal_length(tokenizer, corpus):
    with pytest.raises(DataError, match="10 tokens cannot be 3 windows of equal length"):
        sample_calibration(tokenizer, corpus, samples=2, seq_len=10, seed=7, windows_per_sample=3)


def test_windows_count_where_the_text_is_short(tokenizer, corpus):
    """Long sequences of short windows fit where one long window hardly would."""
    assert sample_calibration(tokenizer, corpus, 1, WORDS, 0, windows_per_sample=2).input_ids.shape == (1, WORDS)
    with pytest.raises(DataError, match=rf"1 samples of {WORDS + 10} tokens need {WORDS + 10}"):
        sample_calibration(tokenizer, corpus, 1, WORDS + 10, 0, windows_per_sample=2)


def test_sampling_leaves_the_global_generator_alone(tokenizer, corpus):
    random.seed(3)
    expected = random.random()
    random.seed(3)
    sample_calibration(tokenizer, corpus, samples=2, seq_len=4, seed=0)
    assert random.random() == expected


def test_seed_decides_the_windows(tokenizer, corpus):
    first, again, other = (sample_calibration(tokenizer, corpus, 4, 8, seed).input_ids for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_provenance_describes_the_draw_and_is_json(tokenizer, corpus):
    provenance = sample_calibration(tokenizer, corpus, samples=3, seq_len=8, seed=5).provenance
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance["sha256"] == hashlib.sha256(corpus.text.encode()).hexdigest()
    assert provenance["characters"] == len(corpus.text)
    described = {key: provenance[key] for key in ("source", "documents", "tokens_available", "samples", "seq_len")}
    assert described == {
        "source": "words", "documents": 2, "tokens_available": WORDS, "samples": 3, "seq_len": 8
    }  # fmt: skip
    assert provenance["seed"] == 5


@pytest.mark.parametrize(("samples", "seq_len"), [(26, 8), (1, WORDS), (1, WORDS + 1), (WORDS, 1)])
def test_too_few_tokens_are_an_error_with_the_numbers(tokenizer, corpus, samples, seq_len):
    with pytest.raises(DataError, match=rf"words has 200 tokens; {samples} samples of {seq_len} tokens need \d+"):
        sample_calibration(tokenizer, corpus, samples, seq_len, seed=0)


@pytest.mark.parametrize(("samples", "seq_len"), [(25, 8), (1, WORDS - 1), (WORDS - 1, 1), (2, 100)])
def test_just_enough_tokens_are_enough(tokenizer, corpus, samples, seq_len):
    assert sample_calibration(tokenizer, corpus, samples, seq_len, seed=0).input_ids.shape == (samples, seq_len)


@pytest.mark.parametrize(("samples", "seq_len"), [(0, 8), (4, 0)])
def test_asking_for_nothing_is_an_error(tokenizer, corpus, samples, seq_len):
    with pytest.raises(DataError, match="at least one"):
        sample_calibration(tokenizer, corpus, samples, seq_len, seed=0)


def test_no_warning_about_a_long_sequence(tokenizer, corpus):
    # transformers' loggers do not propagate to the root, so caplog would miss the warning.
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        sample_calibration(tokenizer, corpus, samples=2, seq_len=4, seed=0)
        evaluation_tokens(tokenizer, corpus, window=4, max_tokens=100)
        assert messages == []
        tokenizer(corpus.text)
        assert any("longer than" in message for message in messages), "the handler would not have seen the warning"
    finally:
        logger.removeHandler(handler)


def test_evaluation_takes_the_first_tokens(tokenizer, corpus):
    tokens = evaluation_tokens(tokenizer, corpus, window=16, max_tokens=100)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == list(range(100))
    assert tokens.untyped_storage().nbytes() == 100 * 8


def test_evaluation_takes_all_of_a_shorter_text(tokenizer, corpus):
    assert evaluation_tokens(tokenizer, corpus, window=WORDS, max_tokens=1_000).tolist() == list(range(WORDS))


def test_evaluation_text_shorter_than_a_window_is_an_error(tokenizer, corpus):
    with pytest.raises(DataError, match="words has 200 tokens, fewer than one window of 201"):
        evaluation_tokens(tokenizer, corpus, window=WORDS + 1, max_tokens=1_000)


def test_fewer_evaluation_tokens_than_a_window_are_an_error(tokenizer, corpus):
    with pytest.raises(DataError, match="At most 15 evaluation tokens"):
        evaluation_tokens(tokenizer, corpus, window=16, max_tokens=15)


def test_batches_cover_everything_in_order():
    ids = torch.arange(20).reshape(5, 4)
    mask = ids % 4 < 3
    tokens = CalibrationTokens(ids, mask, {})
    batches = list(tokens.batches(2))
    assert [batch.shape[0] for batch, _ in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([batch for batch, _ in batches]), ids)
    assert torch.equal(torch.cat([part for _, part in batches]), mask)
    assert tokens.n_tokens == 15


def test_batches_without_padding_have_no_mask():
    batches = list(CalibrationTokens(torch.zeros(3, 4, dtype=torch.int64), None, {}).batches(8))
    assert len(batches) == 1
    assert batches[0][1] is None


def test_batch_size_zero_is_an_error():
    tokens = CalibrationTokens(torch.zeros(3, 4, dtype=torch.int64), None, {})
    with pytest.raises(DataError, match="batch size is 0"):
        list(tokens.batches(0))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (torch.zeros(2, 3), None, "float32"),
        (torch.zeros(6, dtype=torch.int64), None, r"shape \(6,\)"),
        (torch.zeros(0, 3, dtype=torch.int64), None, r"shape \(0, 3\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64), "mask is torch.int64"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool), r"shape \(2, 4\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool), "every token padding"),
    ],
)
def test_wrong_tensors_are_errors(ids, mask, message):
    with pytest.raises(DataError, match=message):
        CalibrationTokens(ids, mask, {})


def with_bos(adds=True):
    """A tokenizer that has a token to begin texts with, and puts it there or not."""
    made = word_tokenizer()
    made.add_special_tokens({"bos_token": "<bos>"})
    if adds:
        made.backend_tokenizer.post_processor = TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)]
        )
    return made


@pytest.mark.parametrize(
    ("adds", "bos", "expected"),
    [
        *((True, "auto", True), (True, "never", False), (True, "always", True)),
        *((False, "auto", False), (False, "never", False), (False, "always", True)),
    ],
)
def test_the_first_token_is_put_where_the_tokenizer_does_or_as_asked(adds, bos, expected):
    made = with_bos(adds)
    assert first_token(made, bos) == (made.bos_token_id if expected else None)


def test_a_tokenizer_without_a_first_token_is_no_reason_to_fail_unless_asked(tokenizer):
    assert first_token(tokenizer, "auto") is None
    with pytest.raises(ConfigError, match="no token that begins a text"):
        first_token(tokenizer, "always")


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_calibration_windows_begin_with_bos_and_go_on_with_the_text(corpus, windows):
    made = with_bos()
    bos, text = made.bos_token_id, made(corpus.text, add_special_tokens=False).input_ids
    drawn = sample_calibration(made, corpus, 5, 16, 3, windows, bos).input_ids
    assert drawn.shape == (5, 16)
    for window in drawn.view(5 * windows, -1).tolist():
        assert window[0] == bos
        assert window[1:] in [text[i : i + len(window) - 1] for i in range(len(text))]
    assert sample_calibration(made, corpus, 5, 16, 3, windows, bos).provenance["bos"] == bos


def test_windows_with_bos_score_every_token_of_the_text_once(corpus):
    made = with_bos()
    bos, text = made.bos_token_id, made(corpus.text, add_special_tokens=False).input_ids
    for window, stride, most in ((16, 16, 100), (16, 15, 100), (16, 4, 100), (10, 1, 40)):
        laid = windows_with_bos(made, corpus, window, stride, most, bos)
        evaluation = EvaluationText(laid, "words", window, stride, bos=True)
        scored = [int(t) for start, first in evaluation.windows for t in laid[start + first : start + window]]
        assert scored == text[: len(scored)]
        assert all(int(laid[start]) == bos for start, _ in evaluation.windows)
        # As many windows as without.
        plain = EvaluationText(evaluation_tokens(made, corpus, window, most), "words", window, stride)
        assert len(evaluation.windows) == len(plain.windows)


def test_with_bos_too_little_text_is_refused_all_the_same(corpus):
    made = with_bos()
    with pytest.raises(DataError, match="fewer than one window"):
        windows_with_bos(made, corpus, 100_000, 1, 100_000, made.bos_token_id)
    with pytest.raises(DataError, match="room for its beginning only"):
        sample_calibration(made, corpus, 2, 4, 0, windows_per_sample=4, bos=made.bos_token_id)
