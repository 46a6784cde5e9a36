import logging
import os
import random
import signal
import sys
import tempfile

import pytest

import fresh
import tiny

# Failures in what contracts assert are explained as those in tests are.
pytest.register_assert_rewrite("extensions")


def pytest_configure(config):
    """Make one server of fresh Pythons for all processes of the tests: the first makes it, the others find it."""
    # A shell starts what it runs in the background with interrupts ignored, and children would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if fresh.VARIABLE not in os.environ and fresh.possible():
        server = fresh.Server(tempfile.mkdtemp(prefix="fresh-"))
        os.environ[fresh.VARIABLE] = server.program
        config.add_cleanup(lambda: os.environ.pop(fresh.VARIABLE))
        config.add_cleanup(server.close)


@pytest.fixture(scope="session", autouse=True)
def fresh_python():
    """Have tests, and the package under test, start the program of ``fresh`` where they start a Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", os.environ.get(fresh.VARIABLE, fresh.REAL))
        yield


@pytest.fixture(autouse=True)
def own_log():
    """The package's log as it was: commands that run in the process of the tests send it to standard error."""
    logger = logging.getLogger("llm_surgeon")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers, logger.level = handlers, level


@pytest.fixture
def real_python(monkeypatch):
    """Real processes: for tests of how Python starts and ends, and of what a process has from others."""
    monkeypatch.setattr(sys, "executable", fresh.REAL)


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
