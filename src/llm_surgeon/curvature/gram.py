"""Sums of outer products in float32, half of each symmetric matrix only."""

from __future__ import annotations

import torch
from torch import Tensor

# Width of the strips that the upper triangle is stored in: narrow enough to save nearly half of the work, wide
# enough for full speed of the matrix products (benchmarks/gram.py).
STRIP = 384


class GramSum:
    """The sum over tokens of ``x x^T``, symmetric ``[size, size]``.

    Only the strips that hold the upper triangle are computed and stored: rows i to i + STRIP of the columns from i
    on. Sums are float32 whatever the inputs' type; the products themselves follow
    ``torch.get_float32_matmul_precision()``.
    """

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.size = size
        self._strips = [
            torch.zeros(min(STRIP, size - start), size - start, dtype=torch.float32, device=device)
            for start in range(0, size, STRIP)
        ]

    def add(self, x: Tensor) -> None:
        """Add the outer products of the rows of ``x [tokens, size]``."""
        x = x.float()
        for number, strip in enumerate(self._strips):
            start = number * STRIP
            strip.addmm_(x[:, start : start + STRIP].T, x[:, start:])

    def dense(self) -> Tensor:
        """The whole matrix, ``[size, size]`` float32."""
        full = self._strips[0].new_zeros(self.size, self.size) if self._strips else torch.zeros(0, 0)
        for number, strip in enumerate(self._strips):
            start, height = number * STRIP, strip.shape[0]
            # The square at the head of a strip was computed whole, but its two halves differ in rounding.
            square = strip[:, :height]
            full[start : start + height, start : start + height] = (square + square.T) / 2
            full[start : start + height, start + height :] = strip[:, height:]
            full[start + height :, start : start + height] = strip[:, height:].T
        return full

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(strip.nbytes for strip in self._strips)
