"""Reconstruction of several layers that write into the residual stream together: the last layers of experts.

The outputs of all of them add up, so that the error of the stream is linear in all their weights at once. The full
system would have a row for each neuron of each expert. Instead every layer answers the error as if it were alone, and
one factor for all answers is then chosen so that the error is least (block Jacobi with an exact line search). Each
round lessens the error, or leaves it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_surgeon.curvature.factors import InputSum
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.mathematics.least_squares import reconstructing_change
from llm_surgeon.models.anatomy import LinearLayer, to_index
from llm_surgeon.models.experts import Routed
from llm_surgeon.models.matrix import check_written, core_of, read_matrix, write_matrix
from llm_surgeon.models.modes import products
from llm_surgeon.passes.hooks import Hooks, with_bias
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.session.session import Session
from llm_surgeon.system.storage import Stored, in_turn

# Rounds of answers; each takes two runs of the block. More lower the error of the stream by less than a hundredth.
ROUNDS = 2


@dataclass(frozen=True)
class _Input:
    """Inputs of one layer, as they enter the stream.

    Attributes:
        x: Inputs, with the bias's, times the router's weights: ``[n, C]`` float32.
        rows: Their tokens, counted among all that count, ``[n]``; None for all of them.
    """

    x: Tensor
    rows: Tensor | None

    def error(self, of_all: Tensor) -> Tensor:
        """Rows of the error ``[tokens, width]`` that the layer can answer."""
        return of_all if self.rows is None else of_all.index_select(0, self.rows)


@dataclass(frozen=True)
class SeveralWriters:
    """Layers at the end of one block that write into the stream together.

    Attributes:
        session: The run.
        keep: Masks of the rows and columns that are left.
        extents: Rows and columns that the tensors around the layers still have.
        stream: Sweep of the pruned model, in front of the block.
        block: Number of the block.
        layers: The layers; those without weights are left out.
        ridge: Penalty on changes, as a fraction of the mean square of a layer's inputs.
        precision: Arithmetic of the block.
        multiplier: Factor of what the layers add to the stream.
    """

    session: Session
    keep: Mapping[str, KeepMask]
    extents: Mapping[str, KeepMask]
    stream: Sweep
    block: int
    layers: Sequence[LinearLayer]
    ridge: float
    precision: str
    multiplier: float

    def correct(self, goals: Sequence[Stored]) -> None:
        """Correct the layers, in place.

        Args:
            goals: Stream of the dense model behind the block, a tensor for each batch.

        Raises:
            NonFiniteError: If inputs or corrected weights are not finite.
            NotPositiveDefiniteError: If a layer's inputs cannot be decomposed even with a larger ridge.
        """
        for _ in range(ROUNDS if self.layers else 0):
            answers = self._answers(goals)
            length = self._length(goals, answers)
            for layer in self.layers:
                matrix = read_matrix(self.session.model, layer)
                changed = matrix + length * answers[layer.name].to(matrix)
                write_matrix(self.session.model, layer, self.keep[layer.name], self.extents[layer.name], changed)
                check_written(layer, core_of(self.session.model, layer))
                self.session.settle(layer)

    def _answers(self, goals: Sequence[Stored]) -> dict[str, Tensor]:
        """Change of each layer's matrix that answers the error as if the layer were alone, ``[K, C]``."""
        sums, crosses = {}, {}
        for layer in self.layers:
            core, device = core_of(self.session.model, layer), self.session.device
            columns = core.in_features + layer.bias
            sums[layer.name] = InputSum(columns, False, device)
            crosses[layer.name] = torch.zeros(core.out_features, columns, device=device)
        tokens = 0
        for error, inputs in self._seen(goals):
            tokens += len(error)
            for layer in self.layers:
                if (seen := inputs.get(layer.name)) is not None:
                    sums[layer.name].add(seen.x)
                    crosses[layer.name].addmm_(self._own(layer, seen.error(error)).T, seen.x)
        processes = self.session.processes
        processes.add_up(crosses.values())
        count = round(processes.total(tokens)[0])

        def answer(name: str) -> Tensor:
            cross, a = crosses[name] / (count * self.multiplier), sums[name].mean(count, None, False)
            return reconstructing_change(cross, a, self.ridge, f"{name} (reconstruction)")

        for total in sums.values():
            total.add_up(processes)
        return {layer.name: processes.from_first(partial(answer, layer.name)) for layer in self.layers}

    def _length(self, goals: Sequence[Stored], answers: Mapping[str, Tensor]) -> float:
        """Factor of all answers with the least error, ``<error, change> / |change|^2``; 0 if nothing changes."""
        along = size = 0.0
        for error, inputs in self._seen(goals):
            change = torch.zeros_like(error)
            for layer in self.layers:
                if (seen := inputs.get(layer.name)) is not None:
                    added = seen.x @ answers[layer.name].to(seen.x).T * self.multiplier
                    whole = added.new_zeros(len(added), change.shape[1])
                    whole[:, to_index(self.keep[layer.name].rows).to(added.device)] = added
                    rows = seen.rows
                    change = change + whole if rows is None else change.index_add_(0, rows, whole)
            along += float((error * change).sum())
            size += float(change.square().sum())
        along, size = self.session.processes.total(along, size)
        return along / size if size > 0 else 0.0

    def _own(self, layer: LinearLayer, error: Tensor) -> Tensor:
        """Columns of an error that a layer's rows write to."""
        return error.index_select(1, to_index(self.keep[layer.name].rows).to(error.device))

    def _seen(self, goals: Sequence[Stored]) -> Iterator[tuple[Tensor, dict[str, _Input]]]:
        """Run the block; yields the error of the stream ``[n, width]`` and the inputs of the layers that were run."""
        inputs: dict[str, _Input] = {}
        with torch.no_grad(), self.stream.ready(self.block), products(self.precision), Hooks() as hooks:
            for layer in self.layers:
                self._watch(hooks, layer, inputs)
            for (batch, waiting), goal in zip(self.stream.entering(), in_turn(goals), strict=True):
                hooks.positions = batch.positions
                leaving = self.stream.run(self.block, batch, waiting.get())
                reached = leaving.flatten(0, -2).index_select(0, batch.positions).float()
                wanted = goal.get()
                if wanted.dim() > 2:
                    wanted = wanted.flatten(0, -2).index_select(0, batch.positions)
                yield wanted.float() - reached, dict(inputs)
                inputs.clear()

    def _watch(self, hooks: Hooks, layer: LinearLayer, inputs: dict[str, _Input]) -> None:
        core = core_of(self.session.model, layer)

        def all_tokens(x: Tensor) -> None:
            # An expert's layer is seen by the other hook.
            if layer.name not in inputs:
                inputs[layer.name] = _Input(with_bias(x.float(), layer.bias), None)

        def some_tokens(x: Tensor, sent: Routed) -> None:
            weighted = with_bias(x.float(), layer.bias) * sent.weights.float()[:, None]
            inputs[layer.name] = _Input(weighted, sent.tokens)

        hooks.on_routed(core, "input", some_tokens)
        hooks.on_input(core, all_tokens)
