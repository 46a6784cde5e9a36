"""Fixtures for extensions that are run end to end: a small recipe, and runs with and without an interrupt."""

import pytest

from llm_surgeon import PruneConfig, prune_checkpoint
from llm_surgeon.export import hugging_face
from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.pruning.checkpoint import Checkpoints
from llm_surgeon.run import export
from quick import without_what_has_other_tests

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 16,
    "eval_window": 32,
    "eval_tokens": 64,
    "shots": 2,
    "sparsity": 0.3,
    "precision": "float32",
}


@pytest.fixture
def small_recipe(text_file):
    """Makes the small recipe, with changes."""

    def make(**changes):
        return PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), **changes})

    return make


def weights(directory):
    """Bytes of the weights that a run has exported, by file."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*.safetensors"))}


@pytest.fixture
def run_and_resume(checkpoint, tmp_path, monkeypatch):
    """Runs a recipe on the tiny checkpoint at one go, and once more with an end after a shot and a continuation.

    Both give the same weights, bit for bit.

    Returns:
        The directory and the report of the run at one go.
    """

    def run(config, ended_after=1, **arguments):
        write = Checkpoints.write

        def interrupted(self, kept, tensors):
            write(self, kept, tensors)
            if kept.shot == ended_after:
                raise KeyboardInterrupt

        whole, resumed = tmp_path / "whole", tmp_path / "resumed"
        with monkeypatch.context() as patch:
            # Reload check and speed have tests of their own; plan, page and picture are made.
            patch.setattr(hugging_face, "verify_export", lambda *_: ReloadCheck(0.0, 1.0))
            patch.setattr(export, "_compare_speed", lambda *_: None)
            report = prune_checkpoint(checkpoint, whole, config, **arguments)
        with monkeypatch.context() as patch:
            without_what_has_other_tests(patch)
            with monkeypatch.context() as ending:
                ending.setattr(Checkpoints, "write", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    prune_checkpoint(checkpoint, resumed, config)
            assert not resumed.exists()
            assert prune_checkpoint(checkpoint, resumed, config).continued == (ended_after,)
        assert weights(resumed) == weights(whole) != {}
        return whole, report

    return run
