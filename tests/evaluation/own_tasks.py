"""Task files on local data, what they give by hand, and what tests of tasks have in common."""

from __future__ import annotations

import importlib.util
import json
import math
from contextlib import contextmanager

import pytest
import torch
import yaml
from torch.nn import functional as F

from llm_surgeon.evaluation.tasks import evaluate_tasks
from tiny import VOCABULARY, build, tokenizer

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

QUESTIONS = 24


def mean_of(metric):
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


# A choice among answers of one to four words, and the last word of a text; see the fixture ``own_tasks``.
PICK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_target": "right",
    "doc_to_choice": "answers",
    "metric_list": [mean_of("acc"), mean_of("acc_norm")],
    "metadata": {"version": 3.0},
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
        mean_of("acc"),
    ],
    "metadata": {"version": 1.0},
}


def measure(tasks, path=None, model=None, **options):
    """Scores of a tiny model on tasks in a directory."""
    return evaluate_tasks(model or build("llama"), tokenizer(), tasks, include_path=path, **options)


def flat(text):
    return " ".join(text.split())


def words(generator, count):
    return " ".join(f"w{generator.randrange(VOCABULARY)}" for _ in range(count))


def write_task(path, name, samples, settings, **functions):
    """A task on local data; functions are given as ``module.function`` of a file beside it."""
    data = path / f"{name}.jsonl"
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf8")
    source = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data), "train": str(data)}},
        "training_split": "train",
        "test_split": "test",
    }
    text = yaml.safe_dump(source | settings) + "".join(f"{key}: !function {own}\n" for key, own in functions.items())
    (path / f"{name}.yaml").write_text(text, encoding="utf8")


def write_lost(path):
    """A task whose data is not there."""
    write_task(path, "lost", [], LAST_WORD)
    (path / "lost.jsonl").unlink()


def write_code(path, name, body):
    """A task whose data set is made by Python code beside it, which first does something else."""
    code = f"""
import datasets

def make(**_):
    {body}
    return datasets.DatasetDict(test=datasets.Dataset.from_list([{{"text": "w1 w2 w3"}}] * 3))

def process(documents):
    return documents.map(lambda document: {{"text": document["text"] + " w4"}})
"""
    (path / f"{name}_code.py").write_text(code, encoding="utf8")
    settings = {"output_type": "loglikelihood", "doc_to_text": "w1", "doc_to_target": "{{text}}"}
    settings["training_split"] = None
    write_task(path, name, [], settings, custom_dataset=f"{name}_code.make", process_docs=f"{name}_code.process")


def read_samples(path, name):
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text(encoding="utf8").splitlines()]


def encode(text):
    return torch.tensor([int(word[1:]) for word in text.split()])


@torch.no_grad()
def log_likelihood(model, context, answer):
    """Of the answer after the context, from a plain pass of one sequence; and whether it is the model's own choice."""
    ids = torch.cat([encode(context), encode(answer)])
    start = len(encode(context))
    scores = F.log_softmax(model(ids[None]).logits[0, start - 1 : -1].double(), dim=-1)
    return float(scores.gather(1, ids[start:, None]).sum()), bool((scores.argmax(-1) == ids[start:]).all())


def next_word(model, text):
    return f"w{int(model(encode(text)[None]).logits[0, -1].argmax())}"


def picked(model, path, count=QUESTIONS):
    """Accuracy with and without the division by the answer's length in characters, by hand."""
    right, right_by_length = 0, 0
    for sample in read_samples(path, "pick")[:count]:
        scores = [log_likelihood(model, sample["question"], answer)[0] for answer in sample["answers"]]
        by_length = [score / len(answer) for score, answer in zip(scores, sample["answers"], strict=True)]
        right += scores.index(max(scores)) == sample["right"]
        right_by_length += by_length.index(max(by_length)) == sample["right"]
    return right / count, right_by_length / count


def ended(model, path):
    """Perplexity of the last words, and how often each is the model's own choice, by hand."""
    results = []
    for sample in read_samples(path, "last_word"):
        context, _, word = sample["text"].rpartition(" ")
        results.append(log_likelihood(model, context, word))
    return math.exp(-sum(value for value, _ in results) / QUESTIONS), sum(greedy for _, greedy in results) / QUESTIONS


class Recorder:
    """Tokens announced and done, by phase."""

    def __init__(self):
        self.announced, self.done = {}, {}

    @contextmanager
    def phase(self, description, total_tokens):
        assert description not in self.announced
        self.announced[description], self.done[description] = total_tokens, 0
        self.name = description
        yield self

    def advance(self, tokens):
        self.done[self.name] += tokens
