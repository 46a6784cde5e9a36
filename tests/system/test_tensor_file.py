"""Files of tensors: safetensors reads what was written, and mapped tensors leave memory again."""

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llm_surgeon.system.allocator import forget_pages
from llm_surgeon.system.tensor_file import _NAMES, TensorFile, write_tensors


@pytest.mark.parametrize("dtype", _NAMES, ids=str)
def test_safetensors_reads_every_type(tmp_path, dtype):
    values = torch.arange(24) % 2 if dtype is torch.bool else torch.arange(24) - (0 if dtype is torch.uint8 else 7)
    tensors = {"matrix": values.to(dtype).view(4, 6), "number": values[3].to(dtype)}
    write_tensors(tmp_path / "file", tensors)
    read = load_file(tmp_path / "file")
    assert {*read} == {*tensors}
    for name, tensor in tensors.items():
        assert read[name].dtype == dtype
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name], tensor)


def test_types_stand_side_by_side_with_words_and_any_layout(tmp_path):
    tensors = {
        "odd": torch.tensor([True, False, True]),
        "whole": torch.randn(3, 5),
        "turned": torch.randn(3, 5).T,
        "part": torch.randn(9, 4)[::2, 1:],
        "empty": torch.zeros(0, 4),
        "learned": torch.nn.Parameter(torch.randn(2)),
        "ümlaut / name": torch.ones(1, dtype=torch.bfloat16),
    }
    write_tensors(tmp_path / "file", tensors, {"words": '{"a": "ü"}'})
    read = load_file(tmp_path / "file")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"words": '{"a": "ü"}'}


def test_a_file_without_tensors(tmp_path):
    write_tensors(tmp_path / "file", {})
    assert load_file(tmp_path / "file") == {}


def test_mapped_tensors_are_in_memory_one_after_the_other(tmp_path):
    size = 2**23
    tensors = {}
    for number in range(8):
        mapped = torch.from_file(str(tmp_path / f"{number}"), shared=True, size=size)
        tensors[str(number)] = mapped.fill_(number)
    for tensor in tensors.values():
        forget_pages(tensor)
    before, seen = psutil.Process().memory_info().rss, []

    class Watched(dict):
        def values(self):
            for tensor in super().values():
                seen.append(psutil.Process().memory_info().rss)
                yield tensor

    write_tensors(tmp_path / "file", Watched(tensors))
    assert max(*seen, psutil.Process().memory_info().rss) - before < 2 * 4 * size
    read = load_file(tmp_path / "file")
    assert all(bool((read[name] == int(name)).all()) for name in tensors)


def test_tensors_of_a_file_are_read_one_after_the_other(tmp_path):
    size = 2**23
    write_tensors(tmp_path / "file", {f"{number}": torch.full((size,), float(number)) for number in range(8)})
    tensors, before = TensorFile(tmp_path / "file"), psutil.Process().memory_info().rss
    assert sorted(tensors) == [f"{number}" for number in range(8)]
    assert "3" in tensors
    assert "8" not in tensors
    for name in tensors:
        assert bool((tensors[name] == int(name)).all())
        assert psutil.Process().memory_info().rss - before < 3 * 4 * size


def test_what_is_read_does_not_depend_on_the_file_any_more(tmp_path):
    write_tensors(tmp_path / "file", {"a": torch.ones(4)})
    read = TensorFile(tmp_path / "file")["a"]
    write_tensors(tmp_path / "file", {"a": torch.zeros(4)})
    assert read.tolist() == [1.0] * 4
