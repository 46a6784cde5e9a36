"""Kronecker factors of every prunable layer, as sums and counts that are divided once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_surgeon.curvature.gram import GramSum
from llm_surgeon.models.family import LinearLayer, to_index
from llm_surgeon.selection import KeepMask


class InputSum:
    """Sums over tokens of one layer input: ``a a^T``, and ``a`` itself where a reader has a bias."""

    def __init__(self, size: int, bias: bool, device: torch.device | str) -> None:
        self.gram = GramSum(size, device)
        self.total = torch.zeros(size, dtype=torch.float32, device=device) if bias else None

    def add(self, inputs: Tensor) -> None:
        """Add inputs ``[tokens, size]``."""
        self.gram.add(inputs)
        if self.total is not None:
            self.total += inputs.sum(0, dtype=torch.float32)

    def mean(self, tokens: int, columns: Tensor | None, bias: bool) -> Tensor:
        """The factor A of one reader: ``[C, C]``, with the homogeneous coordinate as last row and column if biased.

        Args:
            tokens: How many tokens were added.
            columns: Columns that the reader keeps, if it does not read all of the input.
            bias: Whether the reader has a bias.
        """
        a = self.gram.dense() / tokens
        a = a if columns is None else a[columns][:, columns]
        if not bias or self.total is None:
            return a
        mean = (self.total if columns is None else self.total[columns]) / tokens
        top = torch.cat([a, mean[:, None]], dim=1)
        return torch.cat([top, torch.cat([mean, mean.new_ones(1)])[None]], dim=0)


@dataclass(frozen=True)
class Curvature:
    """The factors of all layers after one pass over the calibration tokens.

    Attributes:
        inputs: Sums per input group.
        gradients: Sums of ``g g^T`` per layer, over its kept rows.
        tokens: Tokens with a label, over which both are means.
        full_width: Groups whose sums are over the whole input, of which each reader takes its own columns.
        loss: Mean negative log-likelihood of the calibration tokens, in nats.
    """

    inputs: Mapping[str, InputSum]
    gradients: Mapping[str, GramSum]
    tokens: int
    full_width: frozenset[str]
    loss: float

    def input_factor(self, layer: LinearLayer, keep: KeepMask) -> Tensor:
        """A of one layer over its kept columns and, last, its bias: ``[C, C]``."""
        columns = None
        if layer.input_group in self.full_width:
            columns = to_index(keep.columns)
        return self.inputs[layer.input_group].mean(self.tokens, columns, layer.bias)

    def gradient_factor(self, layer: LinearLayer) -> Tensor:
        """G of one layer over its kept rows: ``[R, R]``."""
        return self.gradients[layer.name].dense() / self.tokens

    @property
    def nbytes(self) -> int:
        """Bytes held by the sums."""
        return sum(item.gram.nbytes for item in self.inputs.values()) + sum(g.nbytes for g in self.gradients.values())
