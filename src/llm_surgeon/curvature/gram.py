"""Sums of outer products in float32: only half of each symmetric matrix is computed and stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llm_surgeon.mathematics import fixed_point
from llm_surgeon.models.modes import products
from llm_surgeon.stopwatch import timed
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.storage import Stored, TensorStore, in_turn

# Height of the strips that the upper triangle is stored in: low enough to save nearly half of the work, high enough
# for full speed of the products. On a CPU with AVX-512, size 1536: 8.1 ms for 192, 9.0 for 384, 13.8 for one product.
STRIP = 192

# Sizes are padded to multiples of this. Pruned layers have hundreds of different sizes, and the CPU's matrix library
# compiles a kernel for each shape of a product; with few shapes they stay in its cache, which saves 30 % of the time
# of a pass at 60 % size.
MULTIPLE = 64


class GramSum:
    """The sum over tokens of ``x x^T``, symmetric ``[size, size]``.

    Only the strips that hold the upper triangle are computed and stored: rows i to i + STRIP of the columns from i
    on. Sums are float32 whatever the inputs' type. The products follow ``torch.get_float32_matmul_precision()``: where
    it allows less than float32 and the CPU has nothing better, ``fixed_point`` computes them. Memory is taken with the
    first addition, unless it has been reserved before.
    """

    def __init__(self, size: int, device: torch.device | str) -> None:
        self.size = size
        self._device = device
        self._padded = -(-size // MULTIPLE) * MULTIPLE
        self._strips: list[Tensor] = []
        self._stored: list[Stored] = []

    @property
    def _shapes(self) -> list[tuple[int, int]]:
        padded = self._padded
        return [(min(STRIP, padded - start), padded - start) for start in range(0, padded, STRIP)]

    def add(self, x: Tensor) -> None:
        """Add the outer products of the rows of ``x [tokens, size]``."""
        if not self._strips:
            self._strips = [torch.zeros(shape, dtype=torch.float32, device=self._device) for shape in self._shapes]
        with timed("factor sums"):
            if self._padded > self.size:
                x = nn.functional.pad(x, (0, self._padded - self.size))
            if torch.get_float32_matmul_precision() == "highest" or not fixed_point.is_fast(x.device):
                self._add_products(x.float())
            else:
                self._add_rounded(x)

    def _add_products(self, x: Tensor) -> None:
        for number, strip in enumerate(self._strips):
            start = number * STRIP
            strip.addmm_(x[:, start : start + STRIP].T, x[:, start:])

    def _add_rounded(self, x: Tensor) -> None:
        parts = fixed_point.rounded(x)
        if len(parts.left):
            # The rows left over are few, and their number differs each time: the library of reduced precision would
            # compile a kernel for each number.
            with products("float32"):
                self._add_products(parts.left)
        for number, strip in enumerate(self._strips):
            start = number * STRIP
            fixed_point.add_product(strip, parts, slice(start, start + STRIP), slice(start, None))

    def begin_in(self, memory: Tensor) -> None:
        """Begin with zeros in the given memory ``[nbytes / 4]``, float32."""
        sizes = [rows * columns for rows, columns in self._shapes]
        parts = memory.zero_().split(sizes) if sizes else ()
        self._strips = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def add_up(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        processes.add_up(self._strips)

    def put_away(self, store: TensorStore) -> None:
        """Put the sum, which has to be complete, into a store."""
        self._stored = [store.put(strip) for strip in self._strips]
        self._strips = []

    def dense(self) -> Tensor:
        """The whole matrix, ``[size, size]`` float32."""
        strips = self._strips or [stored.get() for stored in in_turn(self._stored)]
        if not strips:
            return torch.zeros(self.size, self.size, device=self._device)
        full = strips[0].new_empty(self._padded, self._padded)
        for number, strip in enumerate(strips):
            start, height = number * STRIP, strip.shape[0]
            # The square at the head of a strip was computed whole, but its two halves differ in rounding.
            square = strip[:, :height]
            full[start : start + height, start : start + height] = (square + square.T) / 2
            full[start : start + height, start + height :] = strip[:, height:]
            full[start + height :, start : start + height] = strip[:, height:].T
        return full[: self.size, : self.size].contiguous()

    @property
    def nbytes(self) -> int:
        """Bytes of the sum, wherever it is."""
        return sum(rows * columns * 4 for rows, columns in self._shapes)


def reserve(sums: Sequence[GramSum], device: torch.device | str) -> None:
    """Allocate one piece of memory for sums that are all held until the last one is complete.

    The sums live longer than the tensors that a pass allocates and frees around them. Allocated one by one, between
    tensors of hundreds of sizes, they would leave gaps that no later tensor fits, and memory would grow with every
    shot.
    """
    sizes = [total.nbytes // 4 for total in sums]
    memory = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    for total, own in zip(sums, memory.split(sizes), strict=True):
        total.begin_in(own)
