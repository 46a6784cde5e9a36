"""First and second moments of a layer's inputs and outputs: the statistics of layer-wise scores."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_surgeon.system.processes import Processes


class Moments:
    """Sums over tokens of a vector and of its squares, ``[size]`` float32 each."""

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.count = 0
        self._total = torch.zeros(size, dtype=torch.float32, device=device)
        self._squares = torch.zeros(size, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Add the rows of ``x [tokens, size]``."""
        x = x.float()
        self.count += len(x)
        self._total += x.sum(0)
        self._squares += x.square().sum(0)

    def add_up(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        (count,) = processes.total(self.count)
        self.count = round(count)
        processes.add_up((self._total, self._squares))

    @property
    def mean(self) -> Tensor:
        """Mean ``E[x]``, ``[size]``."""
        return self._total / self.count

    @property
    def variance(self) -> Tensor:
        """Variance ``E[x^2] - E[x]^2``, ``[size]``, never negative."""
        return (self._squares / self.count - self.mean.square()).clamp(min=0)

    @property
    def norm(self) -> Tensor:
        """L2 norm over the tokens, ``[size]``."""
        return self._squares.sqrt()

    @property
    def nbytes(self) -> int:
        """Bytes held by the sums."""
        return self._total.nbytes + self._squares.nbytes
