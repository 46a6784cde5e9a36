"""Tokens of long texts: pieces give what the whole gives, with tokenizers of all kinds, and the whole is not needed."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordLevelTrainer
from transformers import PreTrainedTokenizerFast

from llm_surgeon.data import tokenising
from llm_surgeon.data.tokenising import token_ids

PIECE = 400
WORDS = "the a model pruned layer, naïve 12 3.14 (matrix) 日本語 🙂🙃 über x==y\n\n\t Grüße été's don't 東京都に"


def hostile(characters: int) -> str:
    """Words of several scripts between blanks of several kinds, some of them decomposed or run together."""
    draw = random.Random(0)
    words = [*WORDS.split(" "), "e\u0301tude", "👩‍👩‍👧", "ﬁne", "word" * 6]
    text = ""
    while len(text) < characters:
        text += draw.choice(words) + draw.choice((" ", " ", "  ", "\n", "\n\n", ""))
    return text


def trained(kind: str) -> PreTrainedTokenizerFast:
    text, special = hostile(4000), ["<s>", "</s>", "?"]
    if kind == "words":
        made, trainer = Tokenizer(WordLevel({"?": 2}, unk_token="?")), WordLevelTrainer(special_tokens=special)
        made.pre_tokenizer = WhitespaceSplit()
    elif kind == "bytes":
        made, trainer = Tokenizer(BPE()), BpeTrainer(special_tokens=special, vocab_size=500)
        made.pre_tokenizer = ByteLevel(add_prefix_space=True)
    elif kind == "pairs of a whole text":
        # As in Llama 2: nothing splits the text before the pairs are merged.
        made = Tokenizer(BPE(unk_token="?"))
        trainer = BpeTrainer(special_tokens=special, vocab_size=400)
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made, trainer = Tokenizer(Unigram()), UnigramTrainer(special_tokens=special, vocab_size=300, unk_token="?")
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = Metaspace(prepend_scheme="first")
        made.decoder = decoders.Metaspace()
    lines = text.split("\n") if kind == "pairs of a whole text" else [text]
    made.train_from_iterator(lines, trainer)
    made.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", bos_token="<s>", model_max_length=8)


@pytest.fixture(scope="module", params=["words", "bytes", "pairs of a whole text", "unigrams"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    return trained(request.param)


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(tokenising, "PIECE", PIECE)
    monkeypatch.setattr(tokenising, "CONTEXT", 300)


def whole(tokenizer, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special).input_ids


class Longest:
    """A tokenizer that keeps the length of the longest text that it was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.of, self.is_fast, self.longest = tokenizer, True, 0

    def __call__(self, text: str, **options):
        self.longest = max(self.longest, len(text))
        return self.of(text, **options)


@pytest.mark.parametrize("special", [True, False])
def test_pieces_have_the_tokens_of_the_whole(tokenizer, special):
    text, read = hostile(20_000), Longest(tokenizer)
    assert token_ids(read, text, special=special).tolist() == whole(tokenizer, text, special)
    assert read.longest <= PIECE + 2 * 300


@pytest.mark.parametrize("length", [0, 1, PIECE, PIECE + 1, 2 * PIECE + 1])
def test_texts_that_end_at_a_piece(tokenizer, length):
    text = hostile(3 * PIECE)[:length]
    found = token_ids(tokenizer, text, special=True)
    assert found.dtype == torch.int64
    assert found.tolist() == whole(tokenizer, text, True)


def test_only_as_much_is_read_as_is_wanted(tokenizer):
    text, calls = hostile(20_000), []

    class Counting(Longest):
        def __call__(self, text, **options):
            calls.append(text)
            return super().__call__(text, **options)

    assert token_ids(Counting(tokenizer), text, special=True, most=50).tolist() == whole(tokenizer, text, True)[:50]
    assert len(calls) < 8


@pytest.mark.parametrize("text", ["x" * 5000, " " * 5000, "one two " * 40 + "y" * 3000 + " three" * 400])
def test_a_text_without_a_joint_is_read_on(tokenizer, text):
    assert token_ids(tokenizer, text, special=True).tolist() == whole(tokenizer, text, True)


def test_one_place_without_a_joint_makes_one_longer_piece(tokenizer):
    text, read = hostile(6000) + " " + "z" * 2500 + " " + hostile(6000), Longest(tokenizer)
    assert token_ids(read, text, special=True).tolist() == whole(tokenizer, text, True)
    assert read.longest < len(text) / 2


def test_a_tokenizer_that_tells_no_places(tokenizer):
    class Slow(Longest):
        def __call__(self, text, *, return_offsets_mapping=False, **options):
            assert not return_offsets_mapping
            return super().__call__(text, **options)

    slow, text = Slow(tokenizer), hostile(3000)
    slow.is_fast = False
    assert token_ids(slow, text, special=False).tolist() == whole(tokenizer, text, False)
    assert slow.longest == len(text)
