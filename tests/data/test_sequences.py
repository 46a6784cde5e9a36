"""Sequences to train on: all windows of a text in each pass, and several texts by their shares."""

import pytest
import torch

from llm_surgeon.data.sequences import training_tokens
from llm_surgeon.errors import ConfigError, DataError
from llm_surgeon.recipe.sources import sources_of
from tiny import tokenizer


@pytest.fixture
def words(tmp_path):
    """Writer of a file of words; the tiny tokenizer makes one token of each."""

    def write(name, numbers):
        path = tmp_path / name
        path.write_text(" ".join(f"w{number}" for number in numbers), encoding="utf8")
        return str(path)

    return write


def drawn(texts, sequences, seq_len=4, seed=0, split=frozenset(), bos="never"):
    sources = sources_of(tuple(texts))
    return training_tokens(
        tokenizer(), sources, frozenset(split), sequences=sequences, seq_len=seq_len, seed=seed, bos=bos
    )


def ids_of(numbers):
    return torch.tensor([tokenizer()(f"w{number}").input_ids[-1] for number in numbers])


def test_a_pass_has_each_window_once_and_the_next_one_begins_elsewhere(words):
    numbers = [number % 60 for number in range(43)]
    found = drawn([words("a.txt", numbers)], 40)
    ids = ids_of(numbers)
    cut = [tuple(ids[start : start + 4].tolist()) for start in range(0, 40, 4)]
    passes = [[tuple(row.tolist()) for row in part] for part in found.input_ids.split(10)]
    assert sorted(passes[0]) == sorted(cut)
    assert passes[0] != cut
    windows = {tuple(ids[start : start + 4].tolist()) for start in range(40)}
    for one in passes:
        assert len(set(one)) == 10
        assert set(one) <= windows
    assert any(sorted(one) != sorted(cut) for one in passes[1:])
    (use,) = found.sources
    assert (use.tokens, use.sequences) == (43, 40)
    assert use.passes == pytest.approx(160 / 43)


def test_the_seed_decides_the_order_and_nothing_else_does(words):
    text = words("a.txt", [number * 7 % 60 for number in range(200)])
    one, again, other = (drawn([text], 30, seed=seed).input_ids for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    # Fewer sequences are the first of more.
    assert torch.equal(drawn([text], 10).input_ids, one[:10])


def test_texts_have_their_shares_and_every_part_of_the_sequences_has_each(words):
    low, high = words("low.txt", [number % 10 for number in range(100)]), words("high.txt", [50] * 100)
    found = drawn([f"{low}:0.75", f"{high}:0.25"], 40)
    of_high = (found.input_ids == ids_of([50])[0]).all(1)
    assert [int(part.sum()) for part in of_high.split(8)] == [2] * 5
    assert [use.sequences for use in found.sources] == [30, 10]


def test_what_is_held_out_is_not_trained_on(words):
    text = words("a.txt", [*[1] * 900, *[2] * 100])
    assert not (drawn([text], 300, split={text}).input_ids == ids_of([2])[0]).any()
    assert (drawn([text], 300).input_ids == ids_of([2])[0]).any()


def test_sequences_begin_with_the_token_that_begins_a_text(words):
    own = tokenizer()
    own.bos_token = "w0"
    sources = sources_of((words("a.txt", [5] * 50),))
    found = training_tokens(own, sources, frozenset(), sequences=6, seq_len=5, seed=0, bos="always").input_ids
    assert (found[:, 0] == own.bos_token_id).all()
    assert (found[:, 1:] == ids_of([5])[0]).all()


def test_too_little_text_and_too_small_a_share_are_refused(words):
    short, long = words("short.txt", [1, 2]), words("long.txt", [3] * 50)
    with pytest.raises(DataError, match="has 2 tokens, fewer than one sequence of 4"):
        drawn([short], 3)
    with pytest.raises(ConfigError, match=r"leave none for .*short\.txt', whose share is 0.01"):
        drawn([f"{short}:0.01", f"{long}:0.99"], 10)
