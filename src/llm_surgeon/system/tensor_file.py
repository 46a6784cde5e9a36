"""Files of tensors in the format of safetensors, written and read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llm_surgeon.system.allocator import forget_pages

# Names of the types in the format.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorFile:
    """Tensors of a file by name, each read on access, as a copy on the CPU.

    The file is opened anew for each tensor: what safetensors has read of an open file stays in memory.

    Args:
        path: The file.

    Raises:
        SafetensorError: If it is no such file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            self._names = tuple(file.keys())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name).clone()
        return tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], words: Mapping[str, str] | None = None) -> None:
    """Write tensors to a file that safetensors reads.

    safetensors itself has all tensors in memory while it writes. Here, those that lie in mapped files or on a GPU are
    in memory one after the other. The format: eight bytes with the length of the header, little-endian; the header in
    JSON; the numbers of all tensors without gaps (https://github.com/huggingface/safetensors#format).

    Args:
        path: The file.
        tensors: Tensors by name, of the types of numbers that the package has.
        words: Further entries of the header.

    Raises:
        OSError: If the file cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(words)} if words else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    # Numbers begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
            forget_pages(tensor)
