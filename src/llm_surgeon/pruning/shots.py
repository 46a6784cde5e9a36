"""The global multi-shot loop (paper, Alg. 2): curvature, costs, threshold, update, and again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.curvature import Curvature, Estimation, NearestCurvature, WarmStart, estimate, passes_needed
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import TargetError
from llm_surgeon.mathematics.fisher import Damping
from llm_surgeon.models.anatomy import Anatomy, LinearLayer
from llm_surgeon.models.matrix import core_of, narrow_heads, read_matrix, write_matrix
from llm_surgeon.models.solving import check_written
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.passes.batch_major import Order
from llm_surgeon.pruning.histogram import cost_histogram
from llm_surgeon.pruning.result import RunState, ShotResult
from llm_surgeon.pruning.structures import Masks, Structure, structure_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import CostHistogram
from llm_surgeon.refit.cross_fit import Fitting
from llm_surgeon.refit.gates import warn_of_gates
from llm_surgeon.refit.lora import correct_shot
from llm_surgeon.report.plan import step_of
from llm_surgeon.system.clock import Clock
from llm_surgeon.system.processes import ALONE, Processes
from llm_surgeon.system.progress import Phase, Progress
from llm_surgeon.system.storage import TensorStore

logger = logging.getLogger(__name__)
T = TypeVar("T")


def run_shots(
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokens: CalibrationTokens,
    config: PruneConfig,
    progress: Progress,
    store: TensorStore | None = None,
    processes: Processes = ALONE,
    *,
    since: RunState | None = None,
    dense: PreTrainedModel | None = None,
) -> Iterator[ShotResult]:
    """Prune a model in place, shot by shot; yields after each, so that the caller can evaluate and save.

    Curvature is estimated afresh in each shot, on the model as pruned so far.

    Args:
        model: Dense, or as it was after the shot of ``since``.
        anatomy: The layers of the dense model.
        tokens: All calibration tokens.
        config: The recipe.
        progress: Where progress is shown.
        store: Keeps what has to wait in layer-major passes; None makes them batch-major.
        processes: Who does it together; all have the same model before and after each shot.
        since: Where an earlier run of the same recipe stood; None begins with the first shot.
        dense: The model before pruning, for recipes with reconstruction, see ``goal_of``.

    Raises:
        ConfigError: If the layers do not allow the structure.
        NonFiniteError: If activations, gradients or costs are not finite.
        NotPositiveDefiniteError: If a factor cannot be decomposed even with more damping.
        TargetError: If the last shot misses the sparsity by more than one candidate's weights.
    """
    assert (dense is not None) == config.reconstruction, "the dense model is what reconstruction aims at"
    structure = structure_of(config, anatomy)
    done, previous = 0, cast(WarmStart | None, None)
    if since is not None:
        done, previous = since.shot, since.start
        structure.resume(since.masks)
    if config.gate_steps and processes.first:
        warn_of_gates(anatomy, config)
    run = _Run(model, anatomy, structure, tokens, config, progress, store, processes, dense)
    for number, sparsity in enumerate(config.sparsity_schedule[done:], start=done + 1):
        result = run.shot(number, sparsity, previous)
        previous = result.start
        yield result


@dataclass(frozen=True)
class _Step:
    """One step of a shot: its threshold, how many structures went for their cost and by implication, its scores."""

    threshold: float
    removed: int
    implied: int
    costs: CostHistogram


@dataclass(frozen=True)
class _Run:
    """What all shots of a run have in common."""

    model: PreTrainedModel
    anatomy: Anatomy
    structure: Structure
    tokens: CalibrationTokens
    config: PruneConfig
    progress: Progress
    store: TensorStore | None
    processes: Processes
    dense: PreTrainedModel | None

    def shot(self, number: int, sparsity: float, previous: WarmStart | None) -> ShotResult:
        """One shot, to a sparsity; ``previous`` is what a power iteration sets out from."""
        structure, config, clock = self.structure, self.config, Clock(next(self.model.parameters()).device)
        curvature = self._estimate(number, previous, clock)
        steps = [
            self._step(curvature, target, clock, f"shot {number}/{config.shots}{step_of(step, config.steps_per_shot)}")
            for step, target in enumerate(self._targets(sparsity), start=1)
        ]
        # Only a power iteration has use for what a shot found.
        start = None
        if isinstance(curvature, NearestCurvature):
            start = curvature.warm_start(self.anatomy.layers, structure.shapes)
        factor_bytes, loss = curvature.nbytes, curvature.loss
        del curvature
        reconstructed, gated = self._fitting.after_shot(number, structure.shapes, clock)
        corrected = correct_shot(
            self.model,
            self.anatomy,
            structure.element_masks,
            self.tokens,
            self.config,
            number,
            clock,
            self.progress,
            self.processes,
        )
        return ShotResult(
            shot=number,
            target_sparsity=sparsity,
            masks=structure.masks,
            threshold=steps[-1].threshold,
            removed=sum(step.removed for step in steps),
            implied=sum(step.implied for step in steps),
            factor_bytes=factor_bytes,
            loss=loss,
            costs=steps[-1].costs,
            correction=corrected,
            reconstruction=reconstructed,
            gates=gated,
            seconds=clock.seconds,
            peaks=clock.peaks,
            profile=clock.profile(),
            start=start,
        )

    def _targets(self, sparsity: float) -> Iterator[int]:
        """Weights that are to be left after each step of a shot."""
        before = sum(mask.weights for mask in self.structure.masks.values())
        after, steps = self._left(sparsity), self.config.steps_per_shot
        return (before + round((after - before) * step / steps) for step in range(1, steps + 1))

    def _left(self, sparsity: float) -> int:
        """Weights that are to be left at a sparsity."""
        return round((1 - sparsity) * self.anatomy.prunable_weights)

    def _step(self, curvature: Curvature, target: int, clock: Clock, where: str) -> _Step:
        """Remove what costs least until so many weights are left, and update the others; ``where`` names the step."""
        structure, layers = self.structure, len(self.anatomy.layers)
        with clock.phase("selection"), self.progress.phase(f"{where}: selection", layers, "layers") as phase:
            costs = self._costs(curvature, phase)
            selection = structure.select(costs, target)
            histogram = cost_histogram(structure.scored(costs, selection), structure.score_name, selection.threshold)
            del costs
            if target == self._left(self.config.sparsity):
                dense, what = self.anatomy.prunable_weights, self.config.structure
                _check_reached(selection.keep, target, selection.next_weights, dense, what)
        with clock.phase("update"), self.progress.phase(f"{where}: update", layers, "layers") as phase:
            self._update(curvature, selection, phase)
        return _Step(selection.threshold, selection.structures_chosen, selection.structures_implied, histogram)

    def _estimate(self, number: int, previous: WarmStart | None, clock: Clock) -> Curvature:
        """The curvature of the model as it is, from this process's part of the tokens and those of the others."""
        own = self._own
        how = _estimation(self.config, number, self._fitting.order)
        work = own.input_ids.numel() * passes_needed(how, warm=previous is not None)
        description = f"shot {number}/{self.config.shots}: curvature"
        with clock.phase("curvature"), self.progress.phase(description, work) as phase:
            return estimate(
                self.model,
                self.anatomy,
                self.structure.shapes,
                own,
                how,
                phase.advance,
                previous,
                store=self.store,
                processes=self.processes,
            )

    @cached_property
    def _fitting(self) -> Fitting:
        # Copies of the text are written once for all shots.
        return Fitting(
            self.model, self.dense, self.anatomy, self._own, self.config, self.progress, self.store, self.processes
        )

    @property
    def _own(self) -> CalibrationTokens:
        """This process's part of the tokens."""
        return self.tokens.part(self.processes.part(self.tokens.n_samples))

    @property
    def _damping(self) -> Damping:
        return Damping(self.config.dampening_a, self.config.dampening_g)

    def _share_out(self, compute: Callable[[LinearLayer], T]) -> Iterator[tuple[LinearLayer, T]]:
        """Compute something for each layer, each in one of the processes; a side of a matrix is a decomposition."""
        shapes = self.structure.shapes
        work = {name: float(sum(size**3 for size in shapes[name].shape)) for name in self.anatomy.layers}
        for name, result in self.processes.share_out(work, lambda name: compute(self.anatomy.layers[name])):
            yield self.anatomy.layers[name], result

    def _present(self, layer: LinearLayer) -> AbstractContextManager[None]:
        return weights_of(self.model).present(self.model.get_submodule(layer.name))

    @torch.no_grad()
    def _costs(self, curvature: Curvature, phase: Phase) -> dict[str, Any]:
        structure = self.structure

        def costs_of(layer: LinearLayer) -> Any:
            fisher = curvature.fisher(layer, structure.shapes[layer.name], self._damping)
            with self._present(layer):
                return structure.costs(layer, read_matrix(self.model, layer), fisher)

        found = {}
        for layer, costs in self._share_out(costs_of):
            found[layer.name] = costs
            phase.advance(1)
        return {name: found[name] for name in self.anatomy.layers}

    @torch.no_grad()
    def _update(self, curvature: Curvature, selection: Any, phase: Phase) -> None:
        before, after = self.structure.shapes, self.structure.shapes_after(selection)
        extents = self.anatomy.extents(after)

        def matrix_of(layer: LinearLayer) -> Tensor:
            # Not made yet: where nothing is compensated for, its decomposition would be for nothing.
            fisher = partial(curvature.fisher, layer, before[layer.name], self._damping)
            with self._present(layer):
                return self.structure.matrix_after(layer, read_matrix(self.model, layer), fisher, selection)

        for layer, matrix in self._share_out(matrix_of):
            write_matrix(self.model, layer, after[layer.name], extents[layer.name], matrix)
            check_written(layer, core_of(self.model, layer))
            weights_of(self.model).settle(self.model.get_submodule(layer.name))
            phase.advance(1)
        narrow_heads(self.model, self.anatomy, after)
        self.structure.commit(selection)


def _check_reached(masks: Masks, target: int, next_weights: int, dense: int, structure: str) -> None:
    """Make sure that a run removes what was asked for, but for less than one candidate's weights.

    Args:
        masks: What is left after the last step of the last shot.
        target: Weights that should be.
        next_weights: Weights that the next candidate would have freed; 0: there is none.
        dense: Weights of the dense layers.
        structure: What is removed, in the recipe's words.

    Raises:
        TargetError: If nothing is removed, or if that is missed by more.
    """
    left = sum(mask.weights for mask in masks.values())
    if left == dense or left - target > max(0, next_weights - 1):
        raise TargetError(
            f"{100 * (1 - left / dense):.3g} % of the prunable weights can be removed as {structure}, and "
            f"{100 * (1 - target / dense):.3g} % were to be: the next candidate has {next_weights:,} weights.",
            "Ask for another --sparsity, a lower --min-width or --round-to, or smaller structures.",
        )


def _estimation(config: PruneConfig, shot: int, order: Order) -> Estimation:
    assert config.resolved_curvature is not None  # layer-wise methods do not come here
    return Estimation(
        batch_size=config.sequences_per_pass,
        precision=config.precision,
        curvature=config.resolved_curvature,
        sampled_labels=config.fisher_samples if config.fisher == "true" else 0,
        gradient_share=config.gradient_share,
        # Each shot draws its own labels and tokens.
        seed=config.seed + shot,
        order=order,
    )
