"""Published reports and the paths of the machine they were made on."""

from __future__ import annotations

import pytest

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records.names import distinct_names
from llm_surgeon.report.publish import _masked, recipe_without_paths, without_paths
from report.test_table import sample_report


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/jane/models/llama", "llama"),
        ("llm-surgeon prune /home/jane/llama --out /data/x/out", "llm-surgeon prune llama --out out"),
        ("--calibration=/home/jane/my.txt --seed 1", "--calibration=my.txt --seed 1"),
        ("'/home/jane/a b.txt'", "'a b.txt'"),
        ("~/models/llama", "llama"),
        ("~jane/models/llama/", "."),
        (r"C:\Users\jane\llama", "llama"),
        ("/home/jane/my.txt, characters 1-9 of 10 (held out)", "my.txt, characters 1-9 of 10 (held out)"),
        ("https://huggingface.co/owner/name", "https://huggingface.co/owner/name"),
        ("owner/name:config", "owner/name:config"),
        ("12 tokens/s, 3/4 of it", "12 tokens/s, 3/4 of it"),
        ("./here/and/there", "./here/and/there"),
        ("(q|k)/v", "(q|k)/v"),
    ],
)
def test_absolute_paths_become_their_last_part(text, expected):
    assert _masked(text, {"/home/jane/a b.txt": "a b.txt"}) == expected


def test_everything_of_a_record_is_looked_through():
    record = {"a": ["/x/y/z", {"/x/y/key": ("/x/y/w", 3, None, 0.5)}]}
    assert _masked(record, []) == {"a": ["z", {"key": ["w", 3, None, 0.5]}]}


def test_a_recipe_is_still_one(tmp_path):
    recipe = PruneConfig(calibration=str(tmp_path / "two words.txt"), evaluation=str(tmp_path / "e.txt"), samples=3)
    text = recipe_without_paths(recipe)
    assert str(tmp_path) not in text
    assert "calibration:\n  text: two words.txt\n" in text
    assert "evaluation:\n  text: e.txt\n" in text


def test_a_path_with_spaces_goes_with_and_without_its_column() -> None:
    config = PruneConfig(preset="none", calibration="/home/jane/my own/chats.jsonl#answer").resolved()
    report = sample_report(config=config, calibration={"source": "/home/jane/my own/chats.jsonl, 30 chats"})
    published = without_paths(report)
    assert published.config["calibration"] == "chats.jsonl#answer"
    assert published.calibration["source"] == "chats.jsonl, 30 chats"


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["/a/x", "/b/y"], ["x", "y"]),
        (["/a/x", "/b/x"], ["a/x", "b/x"]),
        (["/a/x", "/a/x", "/c/y"], ["x", "x (2)", "y"]),
        (["/c/a/x", "/d/a/x"], ["c/a/x", "d/a/x"]),
        (["/x", "/a/x"], ["x", "a/x"]),
        (["owner/name", "demo"], ["name", "demo"]),
        (["one"], ["one"]),
        ([], []),
    ],
)
def test_names_have_as_many_parts_as_tell_them_apart(paths, expected):
    found = distinct_names(paths)
    assert found == expected
    assert len({*found}) == len(found)


def test_names_with_a_meaning_of_their_own_are_not_given():
    assert distinct_names(["/a/none", "/b/y"], ("none",)) == ["a/none", "b/y"]
