from __future__ import annotations

import json

import pytest

from llm_surgeon.errors import ModelError
from llm_surgeon.models import loading
from llm_surgeon.models.loading import load_tokenizer, local_directory, positions_of
from tiny import build


@pytest.mark.parametrize(
    ("settings", "positions"),
    [
        ({"max_position_embeddings": 128}, 128),
        ({"text_config": {"max_position_embeddings": 64}, "max_position_embeddings": 128}, 64),
        ({"text_config": None, "max_position_embeddings": 128}, 128),
        ({"vocab_size": 3}, None),
    ],
)
def test_positions_are_read_from_the_configuration(tmp_path, settings, positions):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert positions_of(str(tmp_path)) == positions


def test_a_hub_id_is_fetched_without_weights_of_other_formats(tmp_path, monkeypatch):
    asked = {}

    def fetch(name, ignore_patterns):
        asked[name] = ignore_patterns
        return str(tmp_path)

    monkeypatch.setattr(loading, "snapshot_download", fetch)
    assert local_directory(str(tmp_path)) == tmp_path
    assert asked == {}
    assert local_directory("someone/something") == tmp_path
    assert "*.bin" in asked["someone/something"]
    assert not any("safetensors" in pattern for pattern in asked["someone/something"])


def test_a_hub_id_that_cannot_be_fetched_is_an_error(monkeypatch):
    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(loading, "snapshot_download", fail)
    with pytest.raises(
        ModelError, match=r"'someone/something' cannot be loaded \(there is no such directory.*: no route"
    ):
        local_directory("someone/something")


def test_a_directory_without_a_tokenizer_is_said_to_have_none(tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert "Copy the tokenizer's files" in caught.value.remedy
