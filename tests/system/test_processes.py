"""One process alone, and how work and tokens are divided; runs of several are in ``pipeline/test_several.py``."""

import pickle

import pytest
import torch

from llm_surgeon.errors import ConfigError, DiskSpaceError
from llm_surgeon.system.processes import ALONE, Processes, joined, own_device, shares


def test_parts_follow_one_another_and_differ_by_one_at_most():
    for items in range(12):
        for count in range(1, 5):
            parts = [Processes(rank, count).own(range(items)) for rank in range(count)]
            assert [item for part in parts for item in part] == list(range(items))
            sizes = [len(part) for part in parts]
            assert max(sizes) - min(sizes) <= 1


def test_work_is_shared_out_evenly_and_completely():
    work = {f"layer {number}": float(size**3) for number, size in enumerate([3, 9, 9, 5, 4, 8, 7, 2, 9, 1])}
    for count in (2, 3, 4):
        queues = shares(work, count)
        assert sorted(name for queue in queues for name in queue) == sorted(work)
        loads = [sum(work[name] for name in queue) for queue in queues]
        # The rule for the largest first: at most the mean and one more piece.
        assert max(loads) <= sum(work.values()) / count + max(work.values())
        for queue in queues:
            assert [work[name] for name in queue] == sorted((work[name] for name in queue), reverse=True)
    assert shares(work, 1) == [list(work)]
    assert [queue for queue in shares({"only": 1.0}, 3) if queue] == [["only"]]


def test_one_process_does_everything_itself(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with joined(torch.device("cpu")) as processes:
        assert processes is ALONE
    sums = torch.ones(3)
    ALONE.add_up([sums])
    assert sums.tolist() == [1, 1, 1]
    assert ALONE.total(2.5, 3) == [2.5, 3]
    assert ALONE.from_first(lambda: "result") == "result"
    assert list(ALONE.share_out({"b": 1.0, "a": 2.0}, str.upper)) == [("b", "B"), ("a", "A")]


def test_fewer_sequences_than_processes_are_refused():
    Processes(0, 3).check_samples(3)
    with pytest.raises(ConfigError, match="2 calibration sequences cannot be shared out among 3 processes"):
        Processes(0, 3).check_samples(2)
    Processes(0, 3).check_samples(6, 2)
    with pytest.raises(ConfigError, match="5 calibration sequences cannot be shared out among 3 processes, 2 to each"):
        Processes(0, 3).check_samples(5, 2)


@pytest.fixture
def second_of_two(monkeypatch):
    places = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {"TORCHELASTIC_RUN_ID": "x", **places}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("second_of_two")
def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    assert own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device("auto") == own_device("cuda") == "cuda:1"
    with pytest.raises(ConfigError, match="'cuda:0' cannot serve 2 processes"):
        own_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="2 processes where there are 1 GPUs"):
        own_device("auto")


def test_errors_are_handed_to_other_processes_whole():
    error = pickle.loads(pickle.dumps(DiskSpaceError("It is full.", "Free some.")))
    assert type(error) is DiskSpaceError
    assert (error.cause, error.remedy, str(error)) == ("It is full.", "Free some.", "It is full. Free some.")
