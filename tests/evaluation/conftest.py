import random
import shutil
from pathlib import Path

import pytest

from evaluation.own_tasks import LAST_WORD, PICK, QUESTIONS, next_word, words, write_task
from llm_surgeon import PruneConfig, load, prune
from quick import without_what_has_other_tests
from tiny import build

# Directories of lm-eval that hold the tasks of the README.
FAMILIES = ("super_glue", "piqa", "hellaswag", "winogrande", "arc", "openbookqa", "lambada", "wsc273")


@pytest.fixture(scope="session")
def own_tasks(tmp_path_factory):
    """A directory with two tasks, pick and last_word."""
    path = tmp_path_factory.mktemp("tasks")
    generator = random.Random(0)
    choices = [
        {
            "question": words(generator, generator.randint(3, 9)),
            "answers": [words(generator, generator.randint(1, 4)) for _ in range(3)],
            "right": generator.randrange(3),
        }
        for _ in range(QUESTIONS)
    ]
    write_task(path, "pick", choices, PICK)
    model = build("llama")
    texts = [{"text": words(generator, 6)} for _ in range(QUESTIONS)]
    # A third of them end as the model would end them, or the accuracy would be zero.
    for text in texts[::3]:
        text["text"] += f" {next_word(model, text['text'])}"
    write_task(path, "last_word", texts, LAST_WORD)
    return path


@pytest.fixture(scope="session")
def export(checkpoint, tmp_path_factory):
    """A tiny Llama whose matrices have shrunk."""
    out = tmp_path_factory.mktemp("exports") / "pruned"
    text = out.parent / "text.txt"
    text.write_text(words(random.Random(1), 4_000), encoding="utf8")
    model, own = load(checkpoint)
    settings = {"sparsity": 0.3, "shots": 1, "samples": 8, "seq_len": 32, "evaluation": "none"}
    with pytest.MonkeyPatch.context() as patch:
        without_what_has_other_tests(patch)
        prune(model, own, PruneConfig(calibration=str(text), **settings), out=out)
    return out


@pytest.fixture
def prompts(monkeypatch):
    """Questions that the model is asked, by task."""
    from llm_surgeon.evaluation.harness import MeasuredModel

    seen = {}
    ask = MeasuredModel.loglikelihood

    def note(self, requests, **options):
        seen[self.task] = [request.args[0] for request in requests]
        return ask(self, requests, **options)

    monkeypatch.setattr(MeasuredModel, "loglikelihood", note)
    return seen


@pytest.fixture(scope="session")
def copied(tmp_path_factory):
    """A few of lm-eval's own task files."""
    from lm_eval.tasks import manager

    path = tmp_path_factory.mktemp("published")
    for name in (*FAMILIES, "mmlu/default"):
        shutil.copytree(Path(manager.__file__).parent / name, path / name)
    return path


@pytest.fixture
def few_published(copied, monkeypatch):
    """Of lm-eval's thousands of task files, which take seconds to read, a few only."""
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(copied / "manager.py"))


@pytest.fixture
def unreachable(monkeypatch, tmp_path):
    """A hub that does not answer, and nothing kept from earlier; seconds that each question to it may take."""
    asked = []

    class Client:
        def head(self, url, timeout):
            asked.append(timeout)
            raise ConnectionError

    monkeypatch.setattr("huggingface_hub.get_session", Client)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return asked
