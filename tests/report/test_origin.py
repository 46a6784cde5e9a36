from __future__ import annotations

from pathlib import Path

import pytest

from llm_surgeon.report.origin import DEMO, origin_of


def card(directory: Path, text: str | bytes) -> Path:
    (directory / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    return directory


def test_what_a_card_says_is_taken(tmp_path: Path) -> None:
    front = "license: mit\nlanguage:\n- en\n- fr\ndatasets: [a/b]\nbase_model: c/d\ntags: [x]\n"
    assert origin_of("./m", card(tmp_path, f"---\n{front}---\n# Title\n")) == {
        "base_model": "c/d", "license": "mit", "language": ["en", "fr"], "datasets": ["a/b"],
    }  # fmt: skip
    assert origin_of("./m", card(tmp_path, f"\ufeff---\r\n{front}---\r\n"))["license"] == "mit"


def test_the_demo_is_known() -> None:
    assert origin_of("demo", None) == DEMO
    assert DEMO["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "text",
    [
        "", "# Title\n", "---\nlicense: mit\n", "---\n- a\n---\n", "---\nlicense: [[mit]]\n---\n",
        "---\nlicense: {a: b}\nlanguage: no\n---\n", "---\nlicense: [\n---\n", "---\nlicense: 2024-99-99\n---\n",
        "---\nlicense: " + 10_000 * "[" + "\n---\n", "---\nlicense: " + 1000 * "x" + "\n---\n", b"\xff\xfe\x00",
        "---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
    ],
)  # fmt: skip
def test_a_card_in_another_form_says_nothing(tmp_path: Path, text: str | bytes) -> None:
    assert origin_of("./m", card(tmp_path, text)) == {}


def test_no_card_says_nothing(tmp_path: Path) -> None:
    assert origin_of("./m", tmp_path) == {}
    assert origin_of("owner/name", None) == {}
    (tmp_path / "README.md").mkdir()
    assert origin_of("./m", tmp_path) == {}
