import importlib.util
import json
import random
import unicodedata

import pytest
from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import tiny
from hostile import hostile
from llm_surgeon.errors import ConfigError, ExportMismatchError, UnsupportedModelError
from llm_surgeon.export.gguf.pre_tokenizers import PRE_TOKENIZERS
from llm_surgeon.export.gguf.token_check import ask_engine, check_tokens
from llm_surgeon.export.gguf.tokenizer import add_tokenizer, tokenizer_keys
from tiny_gguf import write

engine = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is missing")
HOSTILE = hostile()
EXACT = [known for known in PRE_TOKENIZERS if known.difference is None]
# Texts of the known differences, for the names that have one.
DIFFERING = {"gpt-4o": ["aΩ", "K\u0301"], "tekken": ["aΩ", "K\u0301"], "deepseek-coder": ["\u3000_", "\u2028("]}


def lines():
    """Random mixtures of the hostile lines' characters: few kinds in each, so that merges are made and broken."""
    generator, characters = random.Random(0), sorted(set("".join(HOSTILE)))
    return [
        "".join(generator.choices([*generator.sample(characters, 4), *"aB's1 2\n"], k=generator.randint(1, 24)))
        for _ in range(3000)
    ]


LINES = lines()
# What is trained on has no names of special tokens in it: they would be merged.
TRAINED = [
    *LINES,
    *(text for texts in DIFFERING.values() for text in texts * 200),
    *(line for line in HOSTILE if ">" not in line),
]


@pytest.fixture(scope="module")
def bytes_backend():
    """Merges of bytes that do not stop at words, so that any other split shows in the tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, initial_alphabet=alphabet, show_progress=False, max_token_length=16)
    backend.train_from_iterator(TRAINED, trainer)
    backend.add_special_tokens(["<|begin|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    return backend.to_str()


@pytest.fixture(scope="module")
def pieces_backend():
    """Merges of characters as from SentencePiece: every pair that makes a token is there."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.train_from_iterator(TRAINED, trainers.BpeTrainer(vocab_size=6000, show_progress=False))
    made = ["".join(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    # SentencePiece gives equal scores to runs of spaces.
    runs = ["▁" * length for length in range(2, 9)]
    made = [token for token in dict.fromkeys(made) if token not in runs]
    characters = sorted({character for token in made for character in token} | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *runs, *made, *characters]
    known = set(tokens)
    pairs = [_pairs(token, known) for token in made]
    mixed = sorted((pair for run in runs for pair in _pairs(run, known)), reverse=True)
    merges = [*(pair for each in pairs for pair in each), *mixed]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return backend.to_str()


def _pairs(token, known):
    cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
    return [(left, right) for left, right in cuts if left in known and right in known]


def wrapped(backend, begins=False, ends=False, **changes):
    """A tokenizer of a backend, with parts of the backend changed."""
    parts = json.loads(backend)
    for path, value in changes.items():
        *way, last = path.split("__")
        place = parts
        for name in way:
            place = place[name]
        place[last] = value
    inner = Tokenizer.from_str(json.dumps(parts))
    pieces = inner.token_to_id("<unk>") is not None
    names = ("<s>", "</s>") if pieces else ("<|begin|>", "<|im_end|>")
    template = f"{names[0] if begins else ''} $A {names[1] if ends else ''}".strip()
    special = [(name, inner.token_to_id(name)) for name in names]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    unknown = {"unk_token": "<unk>"} if pieces else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=names[0], eos_token=names[1], **unknown)


def splitting(steps):
    """A pre-tokenizer of the table as a tokenizer has it."""
    written = {
        "Split": lambda regex: {"pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        "Digits": lambda individual: {"individual_digits": individual},
        "ByteLevel": lambda regex: {"add_prefix_space": False, "trim_offsets": True, "use_regex": regex},
    }
    return {"type": "Sequence", "pretokenizers": [{"type": kind, **written[kind](value)} for kind, value in steps]}


def saved(tokenizer, directory, room=0):
    """A GGUF file with a tokenizer, and its keys."""
    size = len(tokenizer) + room
    file = directory / "tiny.gguf"
    return file, write(file, size, lambda writer: add_tokenizer(writer, tokenizer, size))


@engine
@pytest.mark.parametrize("known", EXACT, ids=lambda known: known.name)
def test_every_name_splits_as_the_tokenizer_does(known, bytes_backend, tmp_path):
    changes = {"pre_tokenizer": splitting(known.steps), "model__ignore_merges": known.whole_words}
    tokenizer = wrapped(bytes_backend, begins=True, **changes)
    file, keys = saved(tokenizer, tmp_path, room=3)
    assert (keys.model, keys.pre, keys.differences) == ("gpt2", known.name, ())
    assert check_tokens(file, tokenizer, [*HOSTILE, *LINES[:1000], "a <tool><|im_end|>\n<tool> b"]) > 10_000


@engine
@pytest.mark.parametrize("known", [k for k in PRE_TOKENIZERS if k.difference], ids=lambda known: known.name)
def test_known_differences_of_a_name_are_named(known, bytes_backend, tmp_path):
    changes = {"pre_tokenizer": splitting(known.steps), "model__ignore_merges": known.whole_words}
    tokenizer = wrapped(bytes_backend, **changes)
    file, keys = saved(tokenizer, tmp_path)
    assert keys.differences == (known.difference,)
    check_tokens(file, tokenizer, [line for line in (*HOSTILE, *LINES[:1000]) if line.isascii()])
    for text in DIFFERING[known.name]:
        with pytest.raises(ExportMismatchError, match="other tokens"):
            check_tokens(file, tokenizer, [text])


PREPENDED = {"type": "Prepend", "prepend": "▁"}
REPLACED = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LLAMA = {"normalizer": {"type": "Sequence", "normalizers": [PREPENDED, REPLACED]}}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
GEMMA = {"normalizer": REPLACED, "pre_tokenizer": SPLIT}


def metaspace(scheme):
    return {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}}


@engine
@pytest.mark.parametrize(
    ("form", "space"), [(LLAMA, True), (GEMMA, False), (metaspace("never"), False)], ids=["llama", "gemma", "never"]
)
def test_pieces_are_merged_in_their_order(form, space, pieces_backend, tmp_path):
    tokenizer = wrapped(pieces_backend, begins=True, ends=True, **form)
    file, keys = saved(tokenizer, tmp_path, room=3)
    assert (keys.model, keys.space, keys.begins, keys.ends, keys.differences) == ("llama", space, True, True, ())
    runs = [f"{left}{' ' * length}{right}" for length in range(60) for left in ("", "x") for right in ("", "x")]
    assert check_tokens(file, tokenizer, [*HOSTILE, *LINES[:1000], *runs]) > 10_000


@engine
@pytest.mark.parametrize(("scheme", "count"), [("always", 1), ("first", 2)])
def test_a_space_before_texts_differs_where_it_is_said(scheme, count, pieces_backend, tmp_path):
    tokenizer = wrapped(pieces_backend, **metaspace(scheme))
    file, keys = saved(tokenizer, tmp_path)
    assert len(keys.differences) == count
    check_tokens(file, tokenizer, [line for line in HOSTILE if not line.startswith((" ", "▁")) and "s>" not in line])
    for text in [" a", "<s>a"][:count]:
        with pytest.raises(ExportMismatchError):
            check_tokens(file, tokenizer, [text])


@engine
def test_texts_are_not_composed_by_llama_cpp(bytes_backend, tmp_path):
    tokenizer = wrapped(bytes_backend, normalizer={"type": "NFC"}, pre_tokenizer=splitting(EXACT[0].steps))
    file, keys = saved(tokenizer, tmp_path)
    assert "NFC" in keys.differences[0]
    composed = [line for line in HOSTILE if unicodedata.is_normalized("NFC", line)]
    check_tokens(file, tokenizer, composed)
    others = [line for line in HOSTILE if line not in composed]
    found = ask_engine(file, {"tokenize": [(unicodedata.normalize("NFC", line), False) for line in others]})["tokenize"]
    assert found == [tokenizer(line).input_ids for line in others]
    with pytest.raises(ExportMismatchError):
        check_tokens(file, tokenizer, others)


@engine
def test_plain_tokens_with_names_of_special_ones_are_named(bytes_backend, tmp_path):
    # The tokenizer merges it where it stands alone, and llama.cpp finds it everywhere.
    parts = json.loads(bytes_backend)["model"]
    merges, vocabulary = [tuple(pair) for pair in parts["merges"]], dict(parts["vocab"])
    for left, right in (("<", "/"), ("</", "s"), ("</s", ">")):
        vocabulary.setdefault(left + right, len(vocabulary) + 10)
        if (left, right) not in merges:
            merges.append((left, right))
    changes = {"model__vocab": vocabulary, "model__merges": merges, "pre_tokenizer": splitting(EXACT[0].steps)}
    tokenizer = wrapped(bytes_backend, **changes)
    file, keys = saved(tokenizer, tmp_path, room=20)
    assert [sentence for sentence in keys.differences if "'</s>'" in sentence]
    with pytest.raises(ExportMismatchError):
        check_tokens(file, tokenizer, ["x</s>"])


@engine
def test_the_check_finds_another_split(bytes_backend, tmp_path):
    size = len(wrapped(bytes_backend))
    claimed = wrapped(bytes_backend, pre_tokenizer=splitting(EXACT[0].steps))
    file = tmp_path / "wrong.gguf"
    write(file, size, lambda writer: add_tokenizer(writer, claimed, size))
    real = wrapped(bytes_backend, pre_tokenizer=splitting(EXACT[1].steps))
    with pytest.raises(ExportMismatchError, match=r"'a\s+1'.*from token \d+ on"):
        check_tokens(file, real, ["a", *(f"a{' ' * length}1" for length in range(9))])


@engine
def test_the_check_says_that_a_file_cannot_be_loaded(bytes_backend, tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(ExportMismatchError, match=r"cannot load broken\.gguf"):
        check_tokens(file, wrapped(bytes_backend), ["a"])


def test_the_check_asks_for_the_engine(bytes_backend, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install xllamacpp"):
        check_tokens(tmp_path / "any.gguf", wrapped(bytes_backend), ["a"])


def test_ids_without_a_token_are_filled(bytes_backend):
    tokenizer = wrapped(bytes_backend, ends=True, pre_tokenizer=splitting(EXACT[0].steps))
    tokenizer.chat_template = {"default": "plain", "tool_use": "tools"}
    tokens = len(tokenizer)
    keys = tokenizer_keys(tokenizer, tokens + 2)
    assert keys.tokens[tokens - 3 :] == ("<|begin|>", "<|im_end|>", "<tool>", f"[PAD{tokens}]", f"[PAD{tokens + 1}]")
    assert keys.types[tokens - 3 :] == (TokenType.CONTROL,) * 2 + (TokenType.USER_DEFINED,) + (TokenType.UNUSED,) * 2
    assert set(keys.types[: tokens - 3]) == {TokenType.NORMAL}
    assert (keys.begins, keys.ends, keys.space) == (False, True, False)
    assert keys.special == {"bos": tokens - 3, "eos": tokens - 2, "eot": tokens - 2}
    assert keys.templates == {"default": "plain", "tool_use": "tools"}


def test_added_tokens_beyond_the_model_are_named_and_others_refused(bytes_backend):
    tokenizer = wrapped(bytes_backend, pre_tokenizer=splitting(EXACT[0].steps))
    keys = tokenizer_keys(tokenizer, len(tokenizer) - 1)
    assert len(keys.tokens) == len(tokenizer) - 1
    assert "'<tool>'" in keys.differences[0]
    with pytest.raises(UnsupportedModelError, match="beyond the 1000 tokens"):
        tokenizer_keys(tokenizer, 1000)


def test_pieces_have_types_and_scores_in_the_order_of_merges(pieces_backend):
    tokenizer = wrapped(pieces_backend, **LLAMA)
    keys = tokenizer_keys(tokenizer, len(tokenizer))
    assert keys.types[:4] == (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE)
    assert keys.types.count(TokenType.BYTE) == 256
    merges = json.loads(pieces_backend)["model"]["merges"]
    scores = [keys.scores[tokenizer.convert_tokens_to_ids("".join(pair))] for pair in merges]
    assert scores == sorted(scores, reverse=True)


def test_what_llama_cpp_cannot_do_is_refused(bytes_backend, pieces_backend):
    gpt2 = {"pre_tokenizer": splitting(EXACT[0].steps)}
    prefixed = splitting(EXACT[0].steps)
    prefixed["pretokenizers"][-1]["add_prefix_space"] = True
    merges = json.loads(pieces_backend)["model"]["merges"]
    made = ["".join(pair) for pair in merges]
    late = next(n for n, token in enumerate(made) if token == made[n + 1])
    for tokenizer, cause in [
        (tiny.tokenizer(), "kind WordLevel"),
        (wrapped(bytes_backend, pre_tokenizer={"type": "Whitespace"}), "not known to split words"),
        (wrapped(bytes_backend, pre_tokenizer=prefixed), "not known to split words"),
        (wrapped(bytes_backend, pre_tokenizer=splitting(EXACT[4].steps), model__ignore_merges=True), "whole words"),
        (wrapped(bytes_backend, model__dropout=0.1, **gpt2), "dropout"),
        (wrapped(bytes_backend, normalizer={"type": "Lowercase"}, **gpt2), "Lowercase"),
        (wrapped(pieces_backend, normalizer={"type": "NFKC"}), "cannot prepare a text"),
        (wrapped(pieces_backend, model__ignore_merges=True, **LLAMA), "ignore_merges"),
        (wrapped(pieces_backend, model__merges=merges[1:], **LLAMA), "every pair"),
        (wrapped(pieces_backend, model__merges=[*merges[:late], *merges[late + 1 :], merges[late]], **LLAMA), "beside"),
    ]:
        with pytest.raises(UnsupportedModelError, match=cause):
            tokenizer_keys(tokenizer, len(tokenizer))


def test_tokens_around_a_text_that_llama_cpp_cannot_put_are_refused(bytes_backend):
    tokenizer = wrapped(bytes_backend, pre_tokenizer=splitting(EXACT[0].steps))
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|begin|>", "<tool>")]
    inner = tokenizer.backend_tokenizer
    for template in ("<|begin|> <tool> $A", "$A <tool>"):
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        with pytest.raises(UnsupportedModelError, match="around a text"):
            tokenizer_keys(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>"), len(tokenizer))
    inner.post_processor = processors.ByteLevel()
    with pytest.raises(UnsupportedModelError, match="no end token"):
        tokenizer_keys(PreTrainedTokenizerFast(tokenizer_object=inner), len(tokenizer))
