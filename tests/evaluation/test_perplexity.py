import math

import pytest
import torch
from torch.nn import functional as F

from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.errors import ConfigError, DataError, NonFiniteError
from llm_surgeon.evaluation.perplexity import perplexity
from tiny import BUILDERS, build, tokens


def text(length=70, window=16, stride=16, seed=3):
    return EvaluationText(tokens(1, length, seed)[0], "words", window, stride, "float32")


@pytest.mark.parametrize("family", BUILDERS)
def test_equals_the_mean_of_plain_window_losses(family, monkeypatch):
    monkeypatch.setattr("llm_surgeon.passes.head.CHUNK", 5)
    model, sample = build(family), text()
    losses = []
    for start in range(0, 64, 16):
        ids = sample.tokens[start : start + 16][None]
        losses.append(float(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).detach()))
    result = perplexity(model, sample)
    assert result.nll == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll))
    assert (result.tokens, result.window, result.stride, result.data) == (60, 16, 16, "words")


def test_overlapping_windows_score_every_token_once():
    sample = text(length=40, window=16, stride=8)
    scored = [position for start, first in sample.windows for position in range(start + first, start + 16)]
    assert scored == list(range(1, 40))
    assert perplexity(build("llama"), sample).tokens == 39


def test_more_context_is_what_a_smaller_stride_gives():
    """The second half of the second window is scored with the first half as context."""
    model, sample = build("llama"), text(length=24, window=16, stride=8)
    first = F.cross_entropy(model(sample.tokens[None, :16]).logits[0, :-1], sample.tokens[1:16])
    second = F.cross_entropy(model(sample.tokens[None, 8:24]).logits[0, 7:-1], sample.tokens[16:24])
    assert perplexity(model, sample).nll == pytest.approx(float((first + second).detach()) / 2, rel=1e-5)


def test_progress_adds_up_to_what_was_announced():
    seen = []
    sample = text(length=40, window=16, stride=8)
    perplexity(build("llama"), sample, seen.append)
    assert sum(seen) == len(sample.windows) * sample.stride


def test_a_text_below_one_window_is_refused():
    with pytest.raises(DataError, match="10 tokens, fewer than one window of 16"):
        text(length=10)


def test_a_stride_that_skips_tokens_is_refused():
    with pytest.raises(ConfigError, match="skips"):
        text(stride=17)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="'int4'"):
        EvaluationText(tokens(1, 32)[0], "words", 16, 16, "int4")


def test_a_broken_model_is_an_error():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="token 0"):
        perplexity(model, text())
