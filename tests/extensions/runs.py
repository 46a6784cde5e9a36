"""Runs of recipes that name something of one's own, from the command or from Python."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from llm_surgeon import PruneConfig, prune_checkpoint
from llm_surgeon.cli import app
from llm_surgeon.pruning.checkpoint import Checkpoints
from llm_surgeon.records import Plan
from tiny import VOCABULARY

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 16,
    "batch_size": 4,
    "precision": "float32",
    "eval_window": 32,
    "eval_tokens": 128,
    "shots": 2,
    "device": "cpu",
}


@contextmanager
def restored(*tables):
    """Take what is registered within the block out of the tables again; yields nothing."""
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, rows in zip(tables, before, strict=True):
            table.clear()
            table.update(rows)


def write_text(path):
    """A text of words that the tiny tokenizer knows, each in some part decided by the one before."""
    word, words = 1, []
    for place in range(6000):
        word = (word * 5 + (place * place) % 3 + 1) % VOCABULARY
        words.append(f"w{word}")
    path.write_text("\n".join(" ".join(words[at : at + 50]) for at in range(0, len(words), 50)), encoding="utf8")
    return path


def recipe(text, **options):
    return PruneConfig.from_mapping({**SMALL, "calibration": str(text), **options})


class RecordedProgress:
    """Phases of a run with their totals and how far they came, in order."""

    def __init__(self):
        self.phases = []

    @contextmanager
    def phase(self, description, total, unit="tokens"):
        entry = [description, total, 0]
        self.phases.append(entry)

        class Count:
            def advance(self, count):
                entry[2] += count

        yield Count()

    def of(self, word):
        """The phases with a word in their description."""
        return [tuple(entry) for entry in self.phases if word in entry[0]]


def planned_by_command(checkpoint, text, out, *words):
    """The plan that the command writes for the options as they are typed."""
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = CliRunner().invoke(
        app, ["plan", str(checkpoint), "--calibration", str(text), "--out", str(out), *small, *words]
    )
    assert done.exit_code == 0, done.output
    return Plan.model_validate(json.loads(out.read_text())), done.output


def interrupted_after(shot, checkpoint, out, config):
    """Start a run that ends once the checkpoint of a shot is written; nothing is at ``out`` then."""
    write = Checkpoints.write

    def write_and_end(self, of_shot, tensors):
        write(self, of_shot, tensors)
        if of_shot.shot == shot:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "write", write_and_end)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(str(checkpoint), out, config)
    assert not out.exists()


def weight_files(out):
    """The bytes of all weight files of an export."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}
    assert found
    return found
