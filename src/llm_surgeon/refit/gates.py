"""Gates of heads and groups of neurons, two of each, set after a shot by the steps of ``mathematics.newton_gates``."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Self

import torch
from torch import Tensor

from llm_surgeon.mathematics.keep_masks import Axis
from llm_surgeon.mathematics.linalg import damping_of
from llm_surgeon.mathematics.newton_gates import effects, evidence_damping, newton_step, rise_at, step_length
from llm_surgeon.models.anatomy import Anatomy, LinearLayer, to_index
from llm_surgeon.models.matrix import check_written, core_of, read_matrix, write_matrix
from llm_surgeon.models.modes import products
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.passes.hooks import Hooks, PairReceive, Side
from llm_surgeon.passes.task import Task
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.refit.stage import Steps
from llm_surgeon.system.storage import Stored, in_turn

logger = logging.getLogger(__name__)

# Number of passes of all tokens in a step: forward and backward, and forward alone.
BACKWARD_PASSES, FORWARD_PASSES = 1, 1
# Number of tokens per gate below which a warning is given: 28 have helped, and one has done harm.
TOKENS_PER_GATE = 10
# Number of tokens per gate for the warning if gates are set by text that reconstruction has not seen: one has helped.
CROSSWISE_TOKENS_PER_GATE = 1
# Bounds of the width of gates that is chosen for such text, unless the recipe says it: the least number of neurons that
# share gates, and the largest number of gates of a model, whose Fisher takes 256 MiB.
NARROWEST, MOST_GATES = 16, 8192
# Side of a layer that a gate on an axis of its matrix multiplies.
_SIDES: dict[Axis, Side] = {"columns": "input", "rows": "output"}


@dataclass(frozen=True)
class Gated:
    """Gates of some rows, or columns, of one layer.

    Attributes:
        layer: The layer.
        axis: Axis of the matrix: rows or columns.
        members: Number of the gate of each row, or column, that the layer has; -1 for a row or column without a gate.
        count: Number of gates.
    """

    layer: LinearLayer
    axis: Axis
    members: Tensor
    count: int


def gates_of(anatomy: Anatomy, width: int | None = None) -> list[Gated]:
    """Gates of a dense model: on outputs and queries of each head, on outputs and switches of each group of neurons.

    Other gates would have the same effects: on values as on outputs, on keys as on queries, and on a feed-forward
    part's second input as on its output.

    Args:
        anatomy: Layers of the model.
        width: Number of consecutive neurons in a group; None takes all of a feed-forward part.
    """
    gates = (gate for part in anatomy.parts for gate in part.gates(width))
    return [_gated(anatomy, rows.layer, axis, rows.index, members) for rows, axis, members in gates]


def gate_width(anatomy: Anatomy, config: PruneConfig) -> int:
    """Number of neurons of a feed-forward part that share gates.

    Without an option in the recipe, all neurons of a part share gates. Under cross-fitting, where the gates are set by
    text that reconstruction has not seen, as few neurons share gates as the tokens allow.

    Args:
        anatomy: Layers of the dense model.
        config: Recipe of the whole run, with the tokens of all processes.
    """
    widest = max([1, *(part.neurons for part in anatomy.parts)])
    if config.gate_width is not None or not config.cross_fit:
        return config.gate_width or widest
    most = min(MOST_GATES, tokens_of_gates(config) // CROSSWISE_TOKENS_PER_GATE)
    width = NARROWEST
    while width < widest and number_of_gates(anatomy, width) > most:
        width *= 2
    return min(width, widest)


def number_of_gates(anatomy: Anatomy, width: int | None = None) -> int:
    """Number of the gates of a dense model, see ``gates_of``."""
    gates = (gate for part in anatomy.parts for gate in part.gates(width))
    return sum(math.ceil(rows.index.numel() / members) for rows, _axis, members in gates)


def tokens_of_gates(config: PruneConfig) -> int:
    """Number of tokens that set the gates of a model."""
    return config.samples * config.seq_len // config.parts_of_text


def count_gates(gates: Iterable[Gated]) -> int:
    """Number of gates of all layers together."""
    return sum(gated.count for gated in gates)


def _gated(anatomy: Anatomy, name: str, axis: Axis, index: Tensor, width: int) -> Gated:
    """Gates of the rows, or columns, of ``index`` in the dense layer: one for each ``width`` of them."""
    layer = anatomy.layers[name]
    members = torch.full((layer.rows if axis == "rows" else layer.columns,), -1)
    members[index.flatten()] = torch.arange(index.numel()) // width
    return Gated(layer, axis, members, math.ceil(index.numel() / width))


def warn_of_gates(anatomy: Anatomy, config: PruneConfig) -> None:
    """Warn if a model has no gates, or if the recipe has few tokens per gate."""
    count, tokens = number_of_gates(anatomy, gate_width(anatomy, config)), tokens_of_gates(config)
    enough = CROSSWISE_TOKENS_PER_GATE if config.cross_fit else TOKENS_PER_GATE
    if not count:
        logger.warning("there are no gates to set: neither an attention nor a feed-forward part is prunable as a whole")
    elif tokens < enough * count:
        logger.warning(
            "%d gates are set by %d tokens: fewer than %d for each fit the text rather than the language; raise "
            "--samples or --gate-width, or leave out --gate-steps",
            count,
            tokens,
            enough,
        )


@dataclass(frozen=True)
class SetGates:
    """The result of setting gates.

    Attributes:
        gates: Number of gates.
        steps: Number of steps that were taken.
        first_loss: Mean loss of the calibration text before the first step, in nats; None without gates.
        last_loss: Mean loss after the last step, by the parabola that gave the step's length; None without gates.
        largest_change: Largest relative change of a gate.
        damping: Damping of the first step, as a fraction of the mean of the diagonal of the gates' Fisher.
    """

    gates: int
    steps: int
    first_loss: float | None
    last_loss: float | None
    largest_change: float
    damping: float | None


def set_gates(
    task: Task, steps: int, damping: float | None = None, width: int | None = None, kept: Steps | None = None
) -> SetGates:
    """Take some Newton steps on the gates of a pruned model, and put them into its weights.

    Args:
        task: The model, with the text whose loss is lowered; ``how`` takes the text's own labels. ``advance`` counts
            all tokens ``BACKWARD_PASSES + FORWARD_PASSES`` times in each step.
        steps: Number of steps, at least one; each step starts with the gates of the step before.
        damping: Damping as a fraction of the mean of the diagonal of the gates' Fisher; None takes, at each step, the
            damping with the largest evidence.
        width: Number of neurons that share gates, see ``gates_of``.
        kept: Steps that an earlier process has taken, and where to tell of further ones; None: none.

    Raises:
        NonFiniteError: If the loss or a weight is not finite.
        ProcessError: If another process is gone.
    """
    gates = (_left(task, gated) for gated in gates_of(task.anatomy, width))
    work = _GateSteps(task, [gated for gated in gates if gated.members.numel()])
    count = count_gates(work.gates)
    if not count:
        return SetGates(gates=0, steps=0, first_loss=None, last_loss=None, largest_change=0.0, damping=None)
    kept = kept or Steps()
    taken = [_Step.of(kept.kept)] if kept.done else []
    task.advance(kept.done * (BACKWARD_PASSES + FORWARD_PASSES) * task.tokens.input_ids.numel())
    for number in range(kept.done, steps):
        taken = [_in_turn([*taken, work.step(damping)])]
        kept.tell(number + 1, taken[0].tensors)
    (whole,) = taken
    return SetGates(
        gates=count,
        steps=steps,
        first_loss=whole.before,
        last_loss=whole.after,
        largest_change=float((whole.factors - 1).abs().max()),
        damping=whole.damping,
    )


@dataclass(frozen=True)
class GateMoments:
    """Moments of the effects of gates over the tokens of a task.

    Attributes:
        slopes: Mean effects ``[gates]``.
        fisher: Mean products of two effects ``[gates, gates]``.
        loss: Mean loss of the tokens, in nats.
        tokens: Number of tokens with a label, in all processes.
    """

    slopes: Tensor
    fisher: Tensor
    loss: float
    tokens: int


def moments(task: Task, gates: Sequence[Gated]) -> GateMoments:
    """Take the moments of the effects of gates over the tokens of a task, in all processes.

    Raises:
        NonFiniteError: If the loss is not finite.
        ProcessError: If another process is gone.
    """
    seen = _Effects(task, gates)
    with Hooks() as hooks:
        seen.watch(hooks)
        result = task.run(hooks, backward=True, finished=seen.put_away)
    slopes, sums = seen.sums()
    task.processes.add_up([slopes, sums])
    return GateMoments(slopes / result.tokens, sums / result.tokens, result.loss, result.tokens)


def _left(task: Task, gated: Gated) -> Gated:
    """Gates of the rows, or columns, that are left; no members if no weights of the layer are left."""
    keep = task.keep[gated.layer.name]
    members = gated.members[to_index(keep.axis(gated.axis))]
    return replace(gated, members=members if keep.weights else members[:0])


@dataclass(frozen=True)
class _Step:
    """A step that was taken, or several together.

    Attributes:
        factors: Factors that multiplied the gates, ``[gates]``.
        before: Loss before the step, in nats.
        after: Loss after the step, as a parabola predicts it.
        damping: Damping of the first step, as a fraction of the mean of the diagonal of the Fisher.
    """

    factors: Tensor
    before: float
    after: float
    damping: float

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The step as tensors that can be kept."""
        figures = torch.tensor([self.before, self.after, self.damping], dtype=torch.float64)
        return {"factors": self.factors, "figures": figures}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The step that was kept as these tensors."""
        return cls(tensors["factors"], *tensors["figures"].tolist())


def _in_turn(steps: Sequence[_Step]) -> _Step:
    """Steps that were taken one after the other, as one."""
    factors = torch.stack([step.factors for step in steps]).prod(0)
    return _Step(factors, steps[0].before, steps[-1].after, steps[0].damping)


@dataclass(frozen=True)
class _GateSteps:
    """Gates of layers that have weights left, and the task whose text sets the gates."""

    task: Task
    gates: list[Gated]

    def step(self, damping: float | None) -> _Step:
        """Take one step, with the given damping or, if None, the damping of largest evidence."""
        seen = moments(self.task, self.gates)
        step, damping = self.task.processes.from_first(partial(_direction, seen, damping))
        step = step.double().cpu()
        slope = float(seen.slopes.double().cpu() @ step)
        self._multiply(1 + step)
        rise = self.task.run(Hooks(), backward=False).loss - seen.loss
        length = step_length(slope, rise)
        # In half precision this rounds a weight twice. The remedy, a copy of the gated layers, would take half as much
        # memory as the model.
        self._multiply((1 + length * step) / (1 + step))
        return _Step(1 + length * step, seen.loss, seen.loss + rise_at(length, slope, rise), damping)

    @torch.no_grad()
    def _multiply(self, factors: Tensor) -> None:
        """Multiply gates ``[gates]`` into the weights, and biases of gated rows."""
        model, keep, extents = self.task.model, self.task.keep, self.task.anatomy.extents(self.task.keep)
        for gated, own in zip(self.gates, factors.split([gated.count for gated in self.gates]), strict=True):
            layer, name = gated.layer, gated.layer.name
            scale = torch.cat([own, own.new_ones(1)])[gated.members]
            with weights_of(model).present(model.get_submodule(name)):
                matrix = read_matrix(model, layer).clone()
            if gated.axis == "rows":
                matrix *= scale[:, None].to(matrix)
            else:
                matrix[:, : len(scale)] *= scale.to(matrix)
            write_matrix(model, layer, keep[name], extents[name], matrix)
            check_written(layer, core_of(model, layer))
            weights_of(model).settle(model.get_submodule(name))


def _direction(seen: GateMoments, fraction: float | None) -> tuple[Tensor, float]:
    """Step of unit length, and its damping as a fraction of the mean of the diagonal of the Fisher."""
    mean = damping_of(seen.fisher, 1.0)
    damping = evidence_damping(seen.slopes, seen.fisher, seen.tokens) if fraction is None else fraction * mean
    return newton_step(seen.slopes, seen.fisher, damping), damping / mean


class _Effects:
    """Effects of gates at the tokens of this process, which wait block by block in the task's store.

    In a batch-major pass, their memory is taken before the pass. Among the tensors that a batch frees, the effects
    would leave gaps that no tensor of the next batch fits.
    """

    def __init__(self, task: Task, gates: Sequence[Gated]) -> None:
        self._task = task
        self._gates: dict[int, list[Gated]] = defaultdict(list)
        for gated in gates:
            self._gates[gated.layer.block].append(gated)
        self._held: dict[int, Tensor] = {}
        self._stored: dict[int, Stored] = {}
        if task.how.order == "batch-major":
            for block in self._gates:
                self._of_block(block)

    def watch(self, hooks: Hooks) -> None:
        """Hook the values that the gates multiply, and their gradients, in each batch of a pass."""
        for block, gates in self._gates.items():
            ends = accumulate(gated.count for gated in gates)
            for gated, end in zip(gates, ends, strict=True):
                receive = self._receiver(block, slice(end - gated.count, end), gated)
                hooks.on_effect(core_of(self._task.model, gated.layer), _SIDES[gated.axis], receive)

    def _receiver(self, block: int, columns: slice, gated: Gated) -> PairReceive:
        """Function that fills some columns of a block's effects."""
        members, done = gated.members.to(self._task.device), 0

        def receive(values: Tensor, gradients: Tensor) -> None:
            nonlocal done
            end = done + len(values)
            self._of_block(block)[done:end, columns] = effects(values, gradients, members, gated.count)
            done = end

        return receive

    def _of_block(self, block: int) -> Tensor:
        """Effects of a block's gates, ``[tokens, gates]``, zero where a token has no label."""
        if block not in self._held:
            tokens = self._task.tokens.input_ids.numel()
            self._held[block] = torch.zeros(tokens, count_gates(self._gates[block]), device=self._task.device)
        return self._held[block]

    def put_away(self, block: int) -> None:
        """Put the effects of a block into the store."""
        if block in self._held:
            self._stored[block] = self._task.store.put(self._held.pop(block))

    def sums(self) -> tuple[Tensor, Tensor]:
        """Sums over tokens of effects ``[gates]`` and of their products ``[gates, gates]``; releases the effects."""
        blocks = [self._stored.pop(block) for block in sorted(self._stored)]
        slopes = torch.cat([block.get().sum(0) for block in in_turn(blocks)])
        sums = slopes.new_zeros(len(slopes), len(slopes))
        first = 0
        # The products are symmetric: each block is multiplied with itself and with the blocks behind it.
        with products(self._task.how.precision):
            for number, block in enumerate(blocks):
                own = block.get().T
                following = torch.cat([own @ other.get() for other in in_turn(blocks[number:])], dim=1)
                sums[first : first + len(own), first:] = following
                sums[first:, first : first + len(own)] = following.T
                first += len(own)
                block.release()
        return slopes, sums
