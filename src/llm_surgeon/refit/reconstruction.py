"""Reconstruction after a shot: layers that write into the residual stream correct the error that it has so far.

The calibration tokens go through the dense and the pruned model side by side, block by block. In each block the output
projections of the attention and of the feed-forward part are corrected, in this order. Their inputs come from blocks
that are pruned and corrected already, as in the result. At the end the last norm is scaled for predictions that are as
sure as they are right. ``mathematics.least_squares`` says what each correction minimises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.curvature.factors import InputSum
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.mathematics.least_squares import reconstructing_change
from llm_surgeon.models.anatomy import Anatomy, LinearLayer, to_index
from llm_surgeon.models.experts import Routed, routed_tokens
from llm_surgeon.models.matrix import check_written, core_of, read_matrix, write_matrix
from llm_surgeon.models.modes import products
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.passes.hooks import Hooks, with_bias
from llm_surgeon.passes.sweep import Batch, Sweep
from llm_surgeon.refit.last_norm import last_norm_parameters, scale_last_norm
from llm_surgeon.refit.several_writers import SeveralWriters
from llm_surgeon.refit.stage import Steps
from llm_surgeon.session.session import Session
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.storage import Stored, in_turn

Advance = Callable[[int], None]

# Number of runs of each block of the dense model, and of the pruned model.
DENSE_RUNS, PRUNED_RUNS = 1, 3
# Largest relative error of a stream that is a plain sum, which only rounding makes. In a stream that is normalised on
# the way, the error is as large as the stream itself.
_ROUNDING = 0.05
_PROBE = 8


@dataclass(frozen=True)
class Reconstruction:
    """Options of a reconstruction.

    Attributes:
        ridge: Penalty on changes of the weights, as a fraction of the mean square of the layer's inputs.
        batch_size: Number of sequences per pass.
        precision: ``bfloat16`` or ``float32`` arithmetic; sums are float32 in any case.
    """

    ridge: float
    batch_size: int
    precision: str


@dataclass(frozen=True)
class Reconstructed:
    """The result of a reconstruction.

    Attributes:
        relative_error: Error of the stream behind the last block, relative to the dense model's stream.
        scale: Factor by which the last norm was multiplied.
    """

    relative_error: float
    scale: float


def dense_copy(model: PreTrainedModel, anatomy: Anatomy, beside: Iterable[str] = ()) -> PreTrainedModel:
    """Copy of a dense model that does not change when the model is pruned; parameters that never change are shared.

    Args:
        model: The model.
        anatomy: Prunable layers of the model.
        beside: Names of parameters that stages change beside these layers and the last norm.
    """
    layers = (model.get_submodule(name) for name in anatomy.layers)
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    own |= {id(model.get_parameter(name)) for name in (*last_norm_parameters(model, anatomy), *beside)}
    shared = {id(tensor): tensor for tensor in model.parameters() if id(tensor) not in own}
    return weights_of(model).copy(model, shared)


def check_stream(session: Session) -> None:
    """Check that a block adds the outputs of its two parts to its input, by running one block on a few tokens.

    Raises:
        UnsupportedModelError: If it does not, as in models that normalise the outputs before they add them.
    """
    model, anatomy = session.model, session.anatomy
    few = CalibrationTokens(session.tokens.input_ids[:1, :_PROBE], None, {})
    sweep = Sweep(model, anatomy.family.blocks, few, 1, session.config.precision)
    parts: list[Tensor] = []
    (batch,) = sweep.batches
    entering = batch.hidden.get()
    with torch.no_grad(), sweep.ready(0), Hooks() as hooks:
        hooks.positions = torch.arange(entering.shape[1], device=entering.device)
        middle, last = _writers(anatomy, 0)
        for output in (middle, *last):
            _sum_outputs(hooks, model.get_submodule(output), parts, len(hooks.positions), entering.shape[-1])
        leaving = sweep.run(0, batch, entering).float().flatten(0, -2)
    added = leaving - entering.float().flatten(0, -2)
    missed = added - _multiplier(anatomy) * sum(part.float() for part in parts)
    if float(missed.norm()) > _ROUNDING * float(added.norm()):
        raise UnsupportedModelError(
            f"A block of {anatomy.family.model_class} does not add what its parts put out to the residual stream as it "
            "is, so that errors of the stream are not linear in the weights that reconstruction corrects.",
            "Leave it out: --no-reconstruction.",
        )


def reconstruct(
    session: Session,
    keep: Mapping[str, KeepMask],
    how: Reconstruction,
    part: CalibrationTokens | None = None,
    *,
    text: int | None = None,
    advance: Advance = lambda _tokens: None,
    steps: Steps | None = None,
) -> Reconstructed:
    """Correct the layers of a pruned model that write into the residual stream, and scale its last norm, in place.

    Args:
        session: The run, with the model as pruned so far and the dense model; layers that are not prunable do not
            change. Hidden states of both models wait in its store, or in the memory of the model's device.
        keep: Masks of the rows and columns that are left, which agree with the model.
        how: Ridge, batches and precision.
        part: Tokens of this process to take; None takes the session's own.
        text: Number of sequences, from the first on, that are real text rather than copies; None: all.
        advance: Function that is called with the number of tokens after each batch that went through a block of either
            model: in total ``DENSE_RUNS + PRUNED_RUNS`` times all tokens for each block.
        steps: Blocks that an earlier process has corrected, and where to tell of further ones; None: none.

    Returns:
        The error of the stream behind the last block, relative to the stream itself, and the scale of the last norm.

    Raises:
        NonFiniteError: If inputs or corrected weights are not finite.
        NotPositiveDefiniteError: If the inputs' matrix cannot be decomposed even with a larger ridge.
    """
    model, anatomy, dense, processes = session.model, session.anatomy, session.dense, session.processes
    assert dense is not None, "the dense model is what reconstruction aims at"
    tokens = session.own if part is None else part
    given = anatomy.family.blocks, tokens, how.batch_size, how.precision, session.store
    goal, stream = Sweep(dense, *given), Sweep(model, *given)
    work, steps = _Corrections(session, keep, anatomy.extents(keep), stream, how, advance), steps or Steps()
    for block in range(steps.done):
        goal.pass_through(block)
        stream.pass_through(block)
        advance(tokens.input_ids.numel() * (DENSE_RUNS + PRUNED_RUNS))
    for block in range(steps.done, len(stream)):
        middle, last = _writers(anatomy, block)
        behind_attention = _behind_attention(goal, dense, block, middle, work.multiplier, advance)
        work.correct(block, middle, behind_attention, inside=True)
        behind = [batch.hidden for batch in goal.batches]
        if len(last) == 1:
            work.correct(block, last[0], behind, inside=False)
        else:
            work.correct_together(block, last, behind)
        for stored in behind_attention:
            stored.release()
        stream.pass_through(block, advance)
        steps.tell(block + 1, {})
    counted = tokens.n_samples if text is None else text
    stream.store.keep_within(much=True)
    scale = scale_last_norm(model, anatomy, stream, counted, how.precision, processes)
    return Reconstructed(_relative_error(goal, stream, processes), scale)


def _sum_outputs(hooks: Hooks, module: nn.Module, parts: list[Tensor], tokens: int, width: int) -> None:
    """Collect what a layer adds to the stream, ``[tokens, width]``; of an expert, times the router's weights."""

    def of_some(output: Tensor, sent: Routed) -> None:
        whole = output.new_zeros(tokens, width, dtype=torch.float32)
        parts.append(whole.index_add_(0, sent.tokens, output.float() * sent.weights.float()[:, None]))

    def of_all(output: Tensor) -> None:
        if routed_tokens(module) is None:
            parts.append(output)

    hooks.on_routed(module, "output", of_some)
    hooks.on_output(module, of_all)


def _writers(anatomy: Anatomy, block: int) -> tuple[str, tuple[str, ...]]:
    """Paths of the layers of a block that write into the stream: of the attention, and of all that comes behind it.

    Raises:
        UnsupportedModelError: If the block has one part only, or several layers end the first.
    """
    parts = [part for part in anatomy.located if part.block == block]
    if len(parts) < 2 or len(parts[0].writers) != 1:
        raise UnsupportedModelError(
            f"A block of {anatomy.family.model_class} does not have one layer that writes into the residual stream in "
            "front of all others, as reconstruction assumes.",
            "Leave it out: --no-reconstruction.",
        )
    return parts[0].writers[0], tuple(name for part in parts[1:] for name in part.writers)


def _multiplier(anatomy: Anatomy) -> float:
    """Factor of all that the parts of a block add to the residual stream."""
    name = anatomy.family.residual.multiplier
    return 1.0 if name is None else float(getattr(anatomy.family.settings_of(anatomy.settings), name))


def _behind_attention(
    goal: Sweep, dense: PreTrainedModel, block: int, output: str, multiplier: float, advance: Advance
) -> list[Stored]:
    """Run a block of the dense model, and return its stream behind the attention, a flat tensor for each batch."""
    entered = [batch.hidden for batch in goal.batches]
    outputs: list[Stored] = []
    with Hooks() as hooks:
        hooks.on_output(dense.get_submodule(output), lambda y: outputs.append(goal.store.put(y)))
        goal.pass_through(block, advance, keep=True, hooks=hooks)
    behind = []
    for batch, before, added in zip(goal.batches, in_turn(entered), in_turn(outputs), strict=True):
        behind.append(goal.store.put(_counted(before.get(), batch.positions) + multiplier * added.get().float()))
        added.release()
        before.release()
    return behind


class _Enough(Exception):  # noqa: N818 - no error
    """End of a pass through a block behind a layer, with the layer's ``output [n, width]``."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _stop(output: Tensor) -> None:
    """End the pass: the stream in front of the feed-forward part, which is most of a block, does not need that part."""
    raise _Enough(output)


@dataclass(frozen=True)
class _Corrections:
    """Corrections of one shot: the models, the sweep of the pruned one, and the options."""

    session: Session
    keep: Mapping[str, KeepMask]
    extents: Mapping[str, KeepMask]
    stream: Sweep
    how: Reconstruction
    advance: Advance

    @property
    def multiplier(self) -> float:
        """Factor of all that the parts of a block add to the residual stream."""
        return _multiplier(self.session.anatomy)

    def correct(self, block: int, name: str, goals: list[Stored], *, inside: bool) -> None:
        """Correct one layer of the block in front of which the pruned model is.

        Args:
            block: Number of the block.
            name: Path of the layer; a layer that is not prunable, or empty, does not change.
            goals: Stream of the dense model behind the layer, a tensor for each batch.
            inside: Whether the layer is inside the block, behind the attention; otherwise it ends the block.
        """
        layer = self.session.anatomy.layers.get(name)
        if layer is None or not core_of(self.session.model, layer).weight.numel():
            self.advance(sum(batch.input_ids.numel() for batch in self.stream.batches))
            return
        core, device = core_of(self.session.model, layer), self.session.device
        inputs = InputSum(core.in_features, layer.bias, device)
        cross = torch.zeros(core.out_features, core.in_features + layer.bias, device=device)
        rows = to_index(self.keep[name].rows).to(device)
        count = 0
        with torch.no_grad(), self.stream.ready(block), products(self.how.precision):
            for (batch, x, stream), goal in zip(self._seen(block, layer, inside), in_turn(goals), strict=True):
                error = _counted(goal.get(), batch.positions) - stream
                inputs.add(x)
                cross.addmm_(error[:, rows].T, with_bias(x.float(), layer.bias))
                count += len(x)
        inputs.add_up(self.session.processes)
        self.session.processes.add_up([cross])
        count = round(self.session.processes.total(count)[0])
        self._change(layer, inputs.mean(count, None, layer.bias), cross / (count * self.multiplier))

    def correct_together(self, block: int, names: Sequence[str], goals: list[Stored]) -> None:
        """Correct the layers that end a block together, with the pruned model in front of it; see ``SeveralWriters``.

        Args:
            block: Number of the block.
            names: Paths of the layers; layers that are not prunable, or empty, do not change.
            goals: Stream of the dense model behind the block, a tensor for each batch.
        """
        session = self.session
        layers = [session.anatomy.layers[name] for name in names if name in session.anatomy.layers]
        left = [layer for layer in layers if core_of(session.model, layer).weight.numel()]
        SeveralWriters(
            *(session, self.keep, self.extents, self.stream, block, left),
            *(self.how.ridge, self.how.precision, self.multiplier),
        ).correct(goals)
        self.advance(sum(batch.input_ids.numel() for batch in self.stream.batches))

    def _seen(self, block: int, layer: LinearLayer, inside: bool) -> Iterator[tuple[Batch, Tensor, Tensor]]:
        """Run the block; yields batches with the layer's inputs ``[n, C]`` and the stream behind it ``[n, width]``."""
        inputs: list[Tensor] = []
        with Hooks() as hooks:
            hooks.on_input(core_of(self.session.model, layer), inputs.append)
            if inside:
                hooks.on_output(self.session.model.get_submodule(layer.name), _stop)
            for batch, waiting in self.stream.entering():
                hooks.positions = batch.positions
                entering = waiting.get()
                try:
                    stream = _counted(self.stream.run(block, batch, entering), batch.positions)
                except _Enough as reached:
                    stream = _counted(entering, batch.positions) + self.multiplier * reached.output
                self.advance(batch.input_ids.numel())
                yield batch, inputs.pop(), stream

    def _change(self, layer: LinearLayer, a: Tensor, error_by_input: Tensor) -> None:
        def solve() -> Tensor:
            return reconstructing_change(error_by_input, a, self.how.ridge, f"{layer.name} (reconstruction)")

        matrix = read_matrix(self.session.model, layer)
        changed = matrix + self.session.processes.from_first(solve).to(matrix)
        write_matrix(self.session.model, layer, self.keep[layer.name], self.extents[layer.name], changed)
        check_written(layer, core_of(self.session.model, layer))
        self.session.settle(layer)


def _relative_error(goal: Sweep, stream: Sweep, processes: Processes) -> float:
    """Error ``|dense - pruned| / |dense|`` of the stream behind the last block; releases the hidden states of both."""
    error = size = 0.0
    for (batch, wanted), (_, reached) in zip(goal.entering(), stream.entering(), strict=True):
        there = _counted(wanted.get(), batch.positions)
        error += float((there - _counted(reached.get(), batch.positions)).square().sum())
        size += float(there.square().sum())
        wanted.release()
        reached.release()
    error, size = processes.total(error, size)
    return math.sqrt(error / size)


def _counted(hidden: Tensor, positions: Tensor) -> Tensor:
    """Hidden states ``[n, width]`` float32 of the tokens that count, of ``[batch, length, width]`` or flat already."""
    flat = hidden if hidden.dim() == 2 else hidden.flatten(0, -2).index_select(0, positions)
    return flat.float()
