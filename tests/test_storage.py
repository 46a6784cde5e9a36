from pathlib import Path

import pytest
import torch

from llm_surgeon import storage
from llm_surgeon.errors import DiskSpaceError
from llm_surgeon.storage import Budgets, TensorStore

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("host", [0, 10**6])
def test_gives_back_what_was_put(host, dtype, tmp_path):
    store = TensorStore(CPU, Budgets(host=host), tmp_path)
    tensor = torch.arange(12).view(3, 4).to(dtype)
    stored = store.put(tensor)
    assert torch.equal(stored.get(), tensor)
    assert store.bytes_on_disk == (0 if host else tensor.nbytes)
    stored.release()
    stored.release()
    assert store.bytes_on_disk == 0


def test_room_that_is_given_back_is_used_again(tmp_path):
    store = TensorStore(CPU, Budgets(host=100), tmp_path)
    first, second = store.put(torch.zeros(20)), store.put(torch.zeros(20))
    assert store.bytes_on_disk == 80
    first.release()
    third = store.put(torch.ones(25))
    assert store.bytes_on_disk == 80
    assert torch.equal(second.get(), torch.zeros(20))
    assert torch.equal(third.get(), torch.ones(25))


@pytest.mark.parametrize("host", [0, 10**6])
def test_what_nobody_holds_gives_its_room_back(host, tmp_path):
    store = TensorStore(CPU, Budgets(host=host), tmp_path)
    stored = store.put(torch.zeros(20))
    del stored
    assert store.bytes_on_disk == 0
    assert store._free["host"] == host


def test_empty_tensors_need_no_room(tmp_path):
    stored = TensorStore(CPU, Budgets(host=-1), tmp_path).put(torch.zeros(0, 3))
    assert stored.get().shape == (0, 3)


def test_nothing_is_seen_in_the_scratch_directory(tmp_path):
    store = TensorStore(CPU, Budgets(host=0), tmp_path)
    stored = store.put(torch.ones(1000))
    assert not list(tmp_path.iterdir())
    assert torch.equal(stored.get(), torch.ones(1000))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    with open("/dev/full", "r+b", buffering=0) as file:
        monkeypatch.setattr(storage.tempfile, "TemporaryFile", lambda **_: file)
        with pytest.raises(DiskSpaceError, match=r"No space left.*--host-memory"):
            TensorStore(CPU, Budgets(host=0), tmp_path).put(torch.zeros(1000))


def test_a_scratch_directory_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DiskSpaceError, match="No such file"):
        TensorStore(CPU, Budgets(host=0), tmp_path / "gone").put(torch.zeros(1000))
