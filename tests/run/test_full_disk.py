"""A disk, a quota or a limit that is full while a run writes: it ends cleanly, and goes on once there is room.

As a script, on a small file system: ``python test_full_disk.py DIRECTORY MODEL TEXT``.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llm_surgeon import PruneConfig, prune_checkpoint
from llm_surgeon.errors import DiskSpaceError
from llm_surgeon.export import hugging_face
from llm_surgeon.pruning.checkpoint import Checkpoints

sys.path.append(str(Path(__file__).parent.parent))  # for the script
from quick import without_what_has_other_tests

resource = pytest.importorskip("resource", reason="this system has no limits of file size")

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 16,
    "shots": 3,
    "precision": "float32",
    "evaluation": "none",
    "sparsity": 0.3,
}
# Exports are expected to take 32 MiB beside their weights.
MOUNT = 'mount -t tmpfs -o size=40m tmpfs "$0" && exec "$@"'


def recipe(text):
    return PruneConfig.from_mapping({**SMALL, "calibration": str(text)})


def weights(out):
    return (out / "model.safetensors").read_bytes()


@contextlib.contextmanager
def largest_file(size):
    """Let this process write no larger files."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def filled(directory, left):
    """Fill a file system but for some bytes."""
    filler = directory / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(directory).free - left))
    try:
        yield
    finally:
        filler.unlink()


def refused(full, out, model, text, patch):
    """Run with the checkpoint of the second shot, then with the export on a full disk, then with room enough.

    Args:
        full: Makes a context without room.
        out: Where to.
        model: What is pruned.
        text: To calibrate on.
        patch: Undone by the caller.
    """
    write, save = Checkpoints.write, hugging_face.save_model

    def write_second(self, checkpoint, tensors):
        with full() if checkpoint.shot == 2 else contextlib.nullcontext():
            write(self, checkpoint, tensors)

    def save_full(*arguments):
        with full():
            return save(*arguments)

    patch.setattr(Checkpoints, "write", write_second)
    with pytest.raises(DiskSpaceError, match=r"shot-2\.safetensors needs about [\d.]+ MiB.* Free [\d.]+ MiB there"):
        prune_checkpoint(str(model), out, recipe(text))
    run = out.with_name("out.run")
    assert {path.name for path in run.glob("shot-*")} == {f"shot-1.{e}" for e in ("safetensors", "json", "sha256")}
    patch.setattr(Checkpoints, "write", write)
    patch.setattr(hugging_face, "save_model", save_full)
    with pytest.raises(DiskSpaceError, match=r"out\.run/export needs about"):
        prune_checkpoint(str(model), out, recipe(text))
    assert Checkpoints(run).shots() == [3, 2]
    assert not any((run / "export").iterdir())
    assert not out.exists()
    patch.setattr(hugging_face, "save_model", save)
    assert prune_checkpoint(str(model), out, recipe(text)).continued == (1, 3)
    assert [path.name for path in out.parent.iterdir() if path.name.startswith("out")] == ["out"]


@pytest.fixture
def undisturbed(checkpoint, text_file, tmp_path, monkeypatch):
    """The weights of a run with room enough."""
    without_what_has_other_tests(monkeypatch)
    prune_checkpoint(str(checkpoint), tmp_path / "undisturbed", recipe(text_file))
    return weights(tmp_path / "undisturbed")


def test_a_limit_of_file_size(checkpoint, text_file, tmp_path, monkeypatch, undisturbed):
    refused(lambda: largest_file(16_384), tmp_path / "out", checkpoint, text_file, monkeypatch)
    assert weights(tmp_path / "out") == undisturbed


@pytest.mark.usefixtures("real_python")  # a file system of its own is seen by none that was there before
def test_a_small_file_system(checkpoint, text_file, tmp_path, undisturbed):
    small = tmp_path / "small"
    small.mkdir()
    mounted = ["unshare", "-Urm", "sh", "-c", MOUNT, str(small)]
    try:
        subprocess.run([*mounted, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    script = [sys.executable, __file__, str(small), str(checkpoint), str(text_file), str(tmp_path / "result")]
    done = subprocess.run([*mounted, *script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "result").read_bytes() == undisturbed


def main(small, model, text, result):
    out = Path(small) / "out"
    with pytest.MonkeyPatch.context() as patch:
        without_what_has_other_tests(patch)
        refused(lambda: filled(Path(small), 16_384), out, model, text, patch)
    shutil.copyfile(out / "model.safetensors", result)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(*sys.argv[1:])
