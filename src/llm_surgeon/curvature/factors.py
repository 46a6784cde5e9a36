"""Kronecker factors of every prunable layer, as sums and counts that are divided once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm_surgeon.curvature.estimator import Curvature
from llm_surgeon.curvature.gram import GramSum
from llm_surgeon.mathematics.fisher import Damping, KroneckerProduct
from llm_surgeon.mathematics.keep_masks import Axis, KeepMask
from llm_surgeon.models.anatomy import LinearLayer, to_index
from llm_surgeon.passes.batch_major import PassResult
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.storage import TensorStore


class InputSum:
    """Sums over tokens of one layer input: ``a a^T``, and ``a`` itself if a layer that reads it has a bias."""

    def __init__(self, size: int, bias: bool, device: torch.device | str) -> None:
        self.gram = GramSum(size, device)
        self.count = 0
        self.total = torch.zeros(size, dtype=torch.float32, device=device) if bias else None

    def add(self, inputs: Tensor) -> None:
        """Add inputs ``[tokens, size]``."""
        self.gram.add(inputs)
        self.count += len(inputs)
        if self.total is not None:
            self.total += inputs.sum(0, dtype=torch.float32)

    def add_up(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        self.gram.add_up(processes)
        self.count = round(processes.total(self.count)[0])
        processes.add_up([] if self.total is None else [self.total])

    def put_away(self, store: TensorStore) -> None:
        """Put the Gram matrix, which has to be complete, into a store."""
        self.gram.put_away(store)

    def mean(self, tokens: int, columns: Tensor | None, bias: bool) -> Tensor:
        """Factor A of one layer that reads the input, ``[C, C]``; a bias is the last row and column (constant input 1).

        Args:
            tokens: Number of tokens of which the mean is: those that were added, and those that the layer does not get.
            columns: Columns that the layer keeps; None if it reads the whole input.
            bias: Whether the layer has a bias.
        """
        a = self.gram.dense() / tokens
        a = a if columns is None else a[columns][:, columns]
        if not bias or self.total is None:
            return a
        mean = (self.total if columns is None else self.total[columns]) / tokens
        top = torch.cat([a, mean[:, None]], dim=1)
        # Tokens that an expert does not get have no constant input either.
        share = mean.new_full((1,), self.count / tokens)
        return torch.cat([top, torch.cat([mean, share])[None]], dim=0)


@dataclass(frozen=True)
class KroneckerFactors(Curvature):
    """One Kronecker product per layer, ``G (x) A``; a factor that was not estimated is the identity.

    Layers of experts see the tokens that are routed to them. Their Fisher is a mean over all tokens, to which the
    others add nothing: with ``r`` of ``n`` tokens, ``r / n`` times the product of the means over the ``r``. So ``A`` is
    the sum over ``n``, as of every layer, and ``G`` the sum over ``r``.

    Attributes:
        inputs: Sums of inputs, by input group.
        gradients: Sums of ``g g^T`` over the kept rows, by layer.
        full_width: Input groups whose sums are over the whole input; each layer takes its own columns of these.
        result: Counts and loss of the pass; None if no data was read.
        estimated: Masks of the layers when the sums were taken. If a layer has lost rows or columns since, its factors
            are the matching blocks, which are exactly the factors of the same tokens and gradients without the rest.
    """

    inputs: Mapping[str, InputSum]
    gradients: Mapping[str, GramSum]
    full_width: frozenset[str]
    result: PassResult | None
    estimated: Mapping[str, KeepMask] = field(default_factory=dict)

    @property
    def loss(self) -> float | None:
        """Mean negative log-likelihood of the calibration tokens, in nats; None if no data was read."""
        return None if self.result is None else self.result.loss

    def fisher(self, layer: LinearLayer, keep: KeepMask, damping: Damping) -> KroneckerProduct:
        """Fisher ``G (x) A`` of one layer over its kept rows and columns and, last, its bias."""
        g = self.gradient_factor(layer)
        if g is not None and len(rows := self._left(layer, keep, "rows")) < len(g):
            g = g[rows][:, rows]
        return KroneckerProduct(g, self.input_factor(layer, keep), damping, layer.name)

    def input_factor(self, layer: LinearLayer, keep: KeepMask) -> Tensor | None:
        """Factor A ``[C, C]`` of one layer over its kept columns and, last, its bias; None for the identity."""
        if self.result is None:
            return None
        total = self.inputs[layer.input_group]
        whole = layer.input_group in self.full_width
        columns = to_index(keep.columns) if whole else self._left(layer, keep, "columns")
        everything = not whole and len(columns) == total.gram.size
        return total.mean(self.result.tokens, None if everything else columns, layer.bias)

    def _left(self, layer: LinearLayer, keep: KeepMask, axis: Axis) -> Tensor:
        """Positions of the kept rows or columns among the ones that the layer had when the sums were taken."""
        there = self.estimated[layer.name].axis(axis) if layer.name in self.estimated else keep.axis(axis)
        return to_index(keep.axis(axis)[there])

    def gradient_factor(self, layer: LinearLayer) -> Tensor | None:
        """Factor G ``[R, R]`` of a layer over the rows that it had when the sums were taken; None for the identity."""
        if self.result is None or layer.name not in self.gradients:
            return None
        tokens = self.inputs[layer.input_group].count or self.result.tokens
        return self.gradients[layer.name].dense() / (tokens * self.result.gradients_per_token)

    @property
    def nbytes(self) -> int:
        """Bytes held by the sums."""
        return sum(item.gram.nbytes for item in self.inputs.values()) + sum(g.nbytes for g in self.gradients.values())
