"""The directory of a run: what appears at its output, and what is left otherwise."""

import pytest

from llm_surgeon.errors import OutputError
from llm_surgeon.records import Memory, PruneReport, Size
from llm_surgeon.run.run_directory import run_directory

REPORT = PruneReport(
    model="m", family="f", config={}, calibration={}, dense_size=Size(prunable=1, total=1), dense_perplexity=None,
    shots=(), layers=(), memory=Memory(peak=1, model=1, factors=1), versions={},
)  # fmt: skip


def finish(out, name, before=lambda: None):
    with run_directory(out) as run:
        run.export.mkdir()
        (run.export / name).write_text("written")
        before()
        run.finish(REPORT)


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "a" / "b"

    def power_cut():
        assert not out.exists()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        finish(out, "half", power_cut)
    assert list((tmp_path / "a").iterdir()) == []
    finish(out, "whole")
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert [path.name for path in out.parent.iterdir()] == ["b"]


def test_an_empty_directory_is_filled_and_one_filled_meanwhile_is_not_harmed(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="is not empty"):
        finish(out, "other", lambda: (out / "file").write_text("x"))
    assert [path.name for path in out.iterdir()] == ["file"]
    (out / "file").unlink()
    finish(out, "file")
    assert (out / "file").read_text() == "written"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_directory_is_locked_until_the_end_and_after_an_end_it_is_not(tmp_path):
    out = tmp_path / "out"
    with run_directory(out), pytest.raises(OutputError, match="Another process works on"), run_directory(out):
        pass
    with run_directory(out):
        assert (tmp_path / "out.run" / "lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "out.run").write_text("x")
    with pytest.raises(OutputError, match=r"out\.run cannot be used: File exists"), run_directory(tmp_path / "out"):
        pass


def test_states_inside_a_shot_are_no_part_of_what_the_disk_is_planned_for(tmp_path):
    """They go when the next checkpoint is there, for which there has to be room beside them."""
    with run_directory(tmp_path / "out") as run:
        (run.path / "shot-1.safetensors").write_bytes(bytes(100))
        for name in ("inside-fits.safetensors", "inside-fits.sha256"):
            (run.path / name).write_bytes(bytes(70))
        assert run.nbytes == 100
