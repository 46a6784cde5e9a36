import random

import pytest

import tiny


@pytest.fixture
def text_file(tmp_path):
    """Ten thousand words the tiny tokenizer knows, with some order to learn."""
    generator = random.Random(0)
    word, words = 0, []
    for _ in range(10_000):
        word = (word * 5 + generator.choice([1, 2, 3])) % tiny.VOCABULARY
        words.append(f"w{word}")
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(words[i : i + 50]) for i in range(0, len(words), 50)), encoding="utf8")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny Llama checkpoint with its tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny-llama"
    model = tiny.build("llama")
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path
