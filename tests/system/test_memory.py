from __future__ import annotations

import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from llm_surgeon.system import memory
from llm_surgeon.system.memory import in_main_memory, peak_device_bytes, peak_resident_bytes, reset_peak

MIB = 2**20


def pages(size: int) -> mmap.mmap:
    """Memory straight from the kernel, each page touched.

    Not from the C allocator: that may answer with freed memory that is still resident, and keeps what is freed, for
    which a run of the command, in an earlier test, has asked it (``runtime.keep_freed_memory``).
    """
    block = mmap.mmap(-1, size)
    block[:: mmap.PAGESIZE] = b"1" * (size // mmap.PAGESIZE)
    return block


def test_peak_grows_with_what_is_touched_and_stays() -> None:
    if not reset_peak():
        pytest.skip("this machine cannot reset the peak, and an earlier one may be higher")
    before = peak_resident_bytes()
    with pages(128 * MIB):
        with_block = peak_resident_bytes()
    assert 100 * MIB < with_block - before < 200 * MIB
    # Linux sums its counters of pages lazily, hence the slack.
    assert peak_resident_bytes() > with_block - MIB


def test_reset_forgets_what_was_freed() -> None:
    with pages(128 * MIB):
        with_block = peak_resident_bytes()
    if not reset_peak():
        pytest.skip("this machine cannot reset the peak")
    assert with_block - peak_resident_bytes() > 100 * MIB


def test_status_file_is_read_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    1234 kB\nVmRSS:\t    1000 kB\n")
    monkeypatch.setattr(memory, "_STATUS", status)
    assert peak_resident_bytes() == 1234 * 1024


@pytest.mark.parametrize("content", [None, "Name:\tpython\n"])
@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_without_the_mark_rusage_answers_in_its_platforms_unit(
    content: str | None, platform: str, unit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    status = tmp_path / "status"
    if content is not None:
        status.write_text(content)
    monkeypatch.setattr(memory, "_STATUS", status)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: type("Usage", (), {"ru_maxrss": 77}))
    assert peak_resident_bytes() == 77 * unit


def test_reset_writes_what_linux_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "clear_refs"
    monkeypatch.setattr(memory, "_CLEAR_REFS", file)
    assert reset_peak()
    assert file.read_text() == "5"


def test_reset_says_when_it_is_not_permitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert not reset_peak()


def test_no_device_memory_without_cuda_in_use() -> None:
    assert peak_device_bytes("cpu") == 0
    if not torch.cuda.is_initialized():
        assert peak_device_bytes("cuda") == 0
        assert not torch.cuda.is_initialized()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_peak_is_counted_and_reset() -> None:
    block = torch.ones(64 * MIB, dtype=torch.uint8, device="cuda")
    del block
    assert peak_device_bytes("cuda") >= 64 * MIB
    reset_peak("cuda")
    assert peak_device_bytes("cuda") < 64 * MIB


def test_available_memory_of_the_host_is_some_of_what_it_has() -> None:
    total = psutil.virtual_memory().total
    assert 0 < memory.available_bytes(torch.device("cpu")) < total


def test_files_in_main_memory_are_told_from_files_on_disk(tmp_path, monkeypatch):
    (tmp_path / "fast" / "inside").mkdir(parents=True)
    mounts = [
        SimpleNamespace(mountpoint="/", fstype="ext4"),
        SimpleNamespace(mountpoint=tmp_path / "fast", fstype="tmpfs"),
    ]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts if all else [])
    assert in_main_memory(tmp_path / "fast" / "inside")
    assert not in_main_memory(tmp_path)
