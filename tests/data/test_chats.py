"""Chats in the forms that people have them, by the template of a tokenizer."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llm_surgeon import PruneConfig, prune_checkpoint
from llm_surgeon.data.corpora import Corpus, load_corpus
from llm_surgeon.data.texts import IN_MEMORY, corpus_of, prepare_texts
from llm_surgeon.data.tokens import evaluation_tokens, sample_calibration
from llm_surgeon.errors import DataError
from quick import without_what_has_other_tests
from tiny import build, tokenizer

TEMPLATE = (
    "{% if tools %}[{{ tools | length }} tools]{% endif %}"
    "{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}{% endif %}"
    "<{{ m.role }}> {{ m.content }}\n{% endfor %}"
)
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
TEXT = "<user> w1 w2\n<assistant> w3\n"
# The same chat in each of the forms.
FORMS = {
    "messages": {"messages": CHAT},
    "ShareGPT": {"conversations": [{"from": "human", "value": "w1 w2"}, {"from": "gpt", "value": "w3"}]},
    "conversations with roles": {"conversations": CHAT},
    "prompt and completion": {"prompt": "w1 w2", "completion": "w3"},
    "prompt and completion as messages": {"prompt": CHAT[:1], "completion": CHAT[1:]},
    "parts of text": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "w1 "}, {"type": "text", "text": "w2"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "w3"}]},
        ]
    },
}


def talking():
    made = tokenizer()
    made.chat_template = TEMPLATE
    return made


def written(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf8")
    return str(path)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_chat(tmp_path, form, ending):
    spec = written(tmp_path / f"chats{ending}", [{**FORMS[form], "id": 1}] * 3)

    corpus = load_corpus(spec)

    assert corpus.chats == 3
    rendered = corpus.rendered(talking())
    assert rendered.documents == (TEXT,) * 3
    assert rendered.text == TEXT * 3, "a template ends a chat by itself"
    assert rendered.source.endswith("3 chats")
    assert rendered.rendered(talking()) is rendered


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_a_column_can_be_named(tmp_path, ending):
    spec = written(tmp_path / f"a{ending}", [{"text": "no", "answer": "w1", "dialogue": CHAT}] * 2)
    assert load_corpus(spec).documents == ("no", "no")
    assert load_corpus(f"{spec}#answer").documents == ("w1", "w1")
    assert load_corpus(f"{spec}#dialogue").rendered(talking()).documents == (TEXT, TEXT)
    with pytest.raises(DataError, match=r"no (key|column) `question`; its (key|column)s are text, answer, dialogue"):
        load_corpus(f"{spec}#question")


def test_a_text_wins_over_a_chat(tmp_path):
    assert load_corpus(written(tmp_path / "a.jsonl", [{"text": "w1", "messages": CHAT}])).documents == ("w1",)


def test_a_mark_in_the_name_of_a_file_is_no_column(tmp_path):
    spec = written(tmp_path / "c#1.jsonl", [{"text": "w1", "b": "w2"}])
    assert load_corpus(spec).text == "w1"
    assert load_corpus(f"{spec}#b").text == "w2"
    with pytest.raises(DataError, match="names no column"):
        load_corpus(f"{spec}#")
    with pytest.raises(DataError, match="demo text has no column"):
        load_corpus("demo:fr#text")
    (tmp_path / "a.txt").write_text("w1", encoding="utf8")
    with pytest.raises(DataError, match="has no columns"):
        load_corpus(f"{tmp_path / 'a.txt'}#text")


def test_tools_are_shown_and_empty_rows_passed_over(tmp_path):
    rows = [{"messages": CHAT, "tools": [{"name": "f"}, {"name": "g"}]}, {"messages": None}, {"messages": []}]
    corpus = load_corpus(written(tmp_path / "a.jsonl", rows))
    assert corpus.rendered(talking()).documents == (f"[2 tools]{TEXT}",)
    assert corpus.source.endswith("(2 rows without text passed over)")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "line 1 holds no messages but str"),
        ({"messages": ["hello"]}, "a message that is no object but str"),
        ({"messages": [{"content": "w1"}]}, "a message without a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "something else than text"),
        ({"messages": [{"role": "user", "content": 3}]}, "something else than text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half a surrogate pair"),
        ({"prompt": "w1"}, "no key `text`; its keys are prompt"),
        ({"prompt": 3, "completion": "w1"}, "line 1"),
    ],
)
def test_what_is_no_chat_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        load_corpus(written(tmp_path / "a.jsonl", [row]))


def test_numbers_of_tools_are_what_they_are(tmp_path):
    """A number too long for Python is no error either."""
    made = talking()
    made.chat_template = "{{ tools[0].maximum }} {{ messages[0].calls[0].x }} {{ messages[0].content }}"
    chat = {"messages": [{"role": "user", "content": "w1", "calls": [{"x": 1234567}]}], "tools": [{"maximum": 50}]}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(chat)[:-1] + ', "id": ' + "9" * 5000 + "}\n", encoding="utf8")
    assert load_corpus(str(path)).rendered(made).documents == ("50 1234567 w1",)


def test_chats_in_memory_are_read_like_those_of_a_file(tmp_path):
    given = ["w1", {"text": "w2"}, *FORMS.values(), CHAT]
    expected = ("w1", "w2", *[TEXT] * (len(FORMS) + 1))
    assert corpus_of(given).rendered(talking()).documents == expected
    with pytest.raises(DataError, match=r"texts\[1\] has no key `text`; its keys are body"):
        corpus_of(["w1", {"body": "w2"}])


def test_chats_have_no_text_before_they_are_rendered():
    with pytest.raises(TypeError):
        _ = corpus_of([CHAT]).text


def test_whoever_draws_windows_draws_them_of_rendered_chats():
    ids = sample_calibration(talking(), corpus_of([CHAT] * 40), 2, 8, seed=0).input_ids
    assert ids.shape == (2, 8)
    assert len(evaluation_tokens(talking(), corpus_of([CHAT] * 40), 8, 64)) == 64


def test_chats_that_the_template_refuses_are_passed_over(tmp_path, caplog):
    strange = {"messages": [{"role": "tool", "content": "w1"}]}
    corpus = load_corpus(written(tmp_path / "a.jsonl", [{"messages": CHAT}, strange, {"messages": CHAT}]))
    assert corpus.rendered(talking()).documents == (TEXT, TEXT)
    assert "refuses 1 chats" in caplog.text
    assert "no role tool" in caplog.text
    with pytest.raises(DataError, match=r"refuses 2 of the 3 chats .* no role tool"):
        load_corpus(written(tmp_path / "b.jsonl", [{"messages": CHAT}, strange, strange])).rendered(talking())


def test_without_a_template_chats_are_refused(tmp_path):
    with pytest.raises(DataError, match="no template"):
        load_corpus(written(tmp_path / "a.jsonl", [{"messages": CHAT}])).rendered(tokenizer())


def test_chats_are_held_out_whole(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"w{number}"}]} for number in range(10)]
    first, last = load_corpus(written(tmp_path / "a.jsonl", rows)).split()
    assert [part.chats for part in (first, last)] == [9, 1]
    assert last.rendered(talking()).text == "<user> w9\n"


def test_prose_for_a_model_that_chats_is_said(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = PruneConfig(samples=2, seq_len=8, calibration=IN_MEMORY, evaluation="none")
    prose, chats = (
        Corpus(("w1 w2 " * 40,), "here"),
        load_corpus(written(tmp_path / "a.jsonl", [{"messages": CHAT}] * 30)),
    )
    for given, template, said in ((prose, True, True), (prose, False, False), (chats, True, False)):
        caplog.clear()
        prepare_texts(talking() if template else tokenizer(), config, given)
        assert ("template for chats" in caplog.text) == said


def test_a_run_on_chats(tmp_path, monkeypatch):
    without_what_has_other_tests(monkeypatch)
    build("llama").save_pretrained(tmp_path / "model")
    talking().save_pretrained(tmp_path / "model")
    rows = [{"messages": [{"role": "user", "content": f"w{n % 60} w{n % 7}"}, CHAT[1]]} for n in range(300)]
    options = {"preset": "none", "shots": 1, "samples": 8, "seq_len": 16, "eval_window": 32, "eval_tokens": 64}

    report = prune_checkpoint(
        tmp_path / "model", tmp_path / "out", options, calibration=written(tmp_path / "chats.jsonl", rows)
    )

    assert report.calibration["source"].endswith("documents 1-270 of 300, 270 chats")
    assert report.shots[-1].perplexity.data.endswith("(held-out part)")


def test_broken_characters_in_memory_are_refused_as_in_files():
    with pytest.raises(DataError, match=r"texts\[1\] holds a broken character"):
        corpus_of(["w1", "w2 \ud800"])
