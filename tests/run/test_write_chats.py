"""Chat texts that a model writes itself: seeded, in the form that calibration takes, and only by chat models."""

import json

import pytest
from typer.testing import CliRunner

from llm_surgeon import PruneConfig, load, write_chats
from llm_surgeon.cli import app
from llm_surgeon.data.chat_prompts import FORMS, FURTHER, MOST, TOPICS, chat_prompts
from llm_surgeon.data.texts import prepare_texts
from llm_surgeon.errors import ConfigError, OutputError
from llm_surgeon.evaluation.sampling import Drawing, drawn_tokens
from llm_surgeon.run.chats import padded
from tiny import build, tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def talking(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "talking"
    words = tokenizer()
    words.chat_template = TEMPLATE
    build("llama").save_pretrained(place)
    words.save_pretrained(place)
    return place


def rows_of(path):
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf8").splitlines()]


def test_prompts_differ_and_some_have_a_second_turn():
    prompts = chat_prompts(MOST, 0)
    assert len({said[0] for said in prompts}) == MOST == len(FORMS) * len(TOPICS) == len({*FORMS}) * len({*TOPICS})
    assert {len(said) for said in prompts} == {1, 2}
    assert {said[1] for said in prompts if len(said) == 2} == {*FURTHER}
    assert chat_prompts(10, 0) == chat_prompts(10, 0) != chat_prompts(10, 1)
    assert not any("{" in text for said in prompts for text in said)


def test_a_model_answers_each_prompt_and_the_seed_decides(talking, tmp_path):
    written = write_chats(talking, tmp_path / "a.jsonl", rows=18, tokens=6, device="cpu")
    write_chats(talking, tmp_path / "b.jsonl", rows=18, tokens=6, device="cpu")
    write_chats(talking, tmp_path / "c.jsonl", rows=18, tokens=6, seed=1, device="cpu")
    chats = rows_of(tmp_path / "a.jsonl")
    assert chats == rows_of(tmp_path / "b.jsonl") != rows_of(tmp_path / "c.jsonl")
    for chat, said in zip(chats, chat_prompts(18, 0), strict=True):
        assert [message["role"] for message in chat] == ["user", "assistant"] * len(said)
        assert tuple(message["content"] for message in chat[::2]) == said
    assert written == sum(len(tokenizer()(m["content"]).input_ids) for chat in chats for m in chat[1::2])
    assert 0 < written <= 6 * 24


def test_padding_in_front_changes_no_greedy_answer(talking):
    """The likeliest answers of prompts side by side are those of each prompt alone."""
    model, words = load(talking, device="cpu")
    texts = ["w1 w2 w3 w4 w5 w6", "w7", "w8 w9 w3"]
    likeliest = Drawing(tokens=5, temperature=1e-3, top_p=1.0)
    together = drawn_tokens(model, words, *padded(words, texts), likeliest, 0)
    for text, row in zip(texts, together, strict=True):
        (alone,) = drawn_tokens(model, words, *padded(words, [text]), likeliest, 0)
        assert alone.tolist() == row[: len(alone)].tolist()


def test_the_text_is_one_to_calibrate_on(talking, tmp_path):
    done = CliRunner().invoke(
        app, ["chats", str(talking), "--out", str(tmp_path / "own.jsonl"), "--rows", "40", "--tokens", "8"]
    )
    assert done.exit_code == 0, done.output
    assert f"--calibration {tmp_path / 'own.jsonl'}" in done.stdout
    config = PruneConfig(calibration=str(tmp_path / "own.jsonl"), samples=4, seq_len=16, evaluation="none")
    tokens = prepare_texts(load(talking, device="cpu")[1], config).calibration
    assert "40 chats" in tokens.provenance["source"]


def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(talking, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_surgeon.run.chats.load", None)
    with pytest.raises(ConfigError, match="no template for chats"):
        write_chats(checkpoint, tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"ends in \.jsonl"):
        write_chats(talking, tmp_path / "a.txt")
    for rows in (0, MOST + 1):
        with pytest.raises(ConfigError, match="Ask for 1 to"):
            write_chats(talking, tmp_path / "a.jsonl", rows=rows)
    with pytest.raises(ConfigError, match="0 tokens"):
        write_chats(talking, tmp_path / "a.jsonl", tokens=0)
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(OutputError):
        write_chats(talking, tmp_path / "there.jsonl")
