"""Statistics of a block's calibration tokens, for layer-wise methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llm_surgeon.curvature.gram import GramSum
from llm_surgeon.curvature.moments import Moments
from llm_surgeon.mathematics.scores import Statistics
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.models.matrix import core_of
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.sweep import Advance, Sweep
from llm_surgeon.system.processes import Processes


@dataclass
class Watched:
    """Sums over the tokens of one block; empty if no tokens were read.

    Attributes:
        inputs: Moments of the inputs, by input group: layers that read the same input share the moments.
        outputs: Moments of the outputs, by layer.
        grams: Sums of ``a a^T`` by input group, if asked for.
    """

    inputs: dict[str, Moments] = field(default_factory=dict)
    outputs: dict[str, Moments] = field(default_factory=dict)
    grams: dict[str, GramSum] = field(default_factory=dict)

    def statistics(self, layer: LinearLayer) -> Statistics:
        """Statistics of a layer that scores may use; all norms are 1 if no tokens were read."""
        if not self.inputs:
            return Statistics(torch.ones(layer.columns), torch.ones(layer.rows))
        return Statistics(self.inputs[layer.input_group].norm, self.outputs[layer.name].norm)

    def mean_gram(self, layer: LinearLayer) -> Tensor:
        """Factor ``A = mean a a^T`` of a layer's inputs, ``[C, C]``."""
        group = layer.input_group
        return self.grams[group].dense() / self.inputs[group].count

    def add_up(self, processes: Processes) -> None:
        """Add the sums of the other processes."""
        for moments in (*self.inputs.values(), *self.outputs.values()):
            moments.add_up(processes)
        for gram in self.grams.values():
            gram.add_up(processes)

    @property
    def nbytes(self) -> int:
        """Bytes held by the sums."""
        moments = [*self.inputs.values(), *self.outputs.values()]
        return sum(item.nbytes for item in moments) + sum(gram.nbytes for gram in self.grams.values())


def watch(
    model: nn.Module,
    sweep: Sweep,
    block: int,
    layers: Sequence[LinearLayer],
    *,
    grams: bool,
    advance: Advance,
) -> Watched:
    """Run the block in front of which a sweep is, and take the statistics of its layers.

    Args:
        model: The model that the sweep goes through.
        sweep: The sweep, which stays in front of the block.
        block: Number of the block.
        layers: Prunable layers of the block.
        grams: Whether the Gram matrices of the inputs are wanted.
        advance: Function that is called with the number of tokens after each batch.
    """
    watched, device = Watched(), next(model.parameters()).device
    with Hooks() as hooks:
        for layer in layers:
            core, group = core_of(model, layer), layer.input_group
            if group not in watched.inputs:
                watched.inputs[group] = Moments(layer.columns, device)
                hooks.on_input(core, watched.inputs[group].add)
                if grams:
                    watched.grams[group] = GramSum(layer.columns, device)
                    hooks.on_input(core, watched.grams[group].add)
            watched.outputs[layer.name] = Moments(layer.rows, device)
            hooks.on_output(core, watched.outputs[layer.name].add)
        sweep.watch(block, hooks, advance)
    return watched
