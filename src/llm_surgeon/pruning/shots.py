"""The global multi-shot loop (paper, Alg. 2): in each shot curvature, costs, threshold and update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from llm_surgeon.curvature import Curvature, WarmStart, estimate, estimation_of, estimator_of, passes_needed
from llm_surgeon.errors import TargetError
from llm_surgeon.mathematics.fisher import Damping
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.models.matrix import check_written, core_of, narrow_heads, read_matrix, write_matrix
from llm_surgeon.pruning.histogram import cost_histogram
from llm_surgeon.pruning.loop import Loop
from llm_surgeon.pruning.removals import removals_of
from llm_surgeon.pruning.result import RunState, ShotResult
from llm_surgeon.pruning.structures import Masks, Structure, structure_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import CostHistogram
from llm_surgeon.refit.stage import Shot
from llm_surgeon.refit.stages import Stages, phase_name
from llm_surgeon.session.session import Session, decomposition_work
from llm_surgeon.system.clock import Clock
from llm_surgeon.system.progress import Phase

T = TypeVar("T")


class GlobalShots(Loop):
    """Shots with one threshold over all layers; the curvature is estimated afresh in each."""

    name = "shots"

    def run(self, session: Session, since: RunState | None = None) -> Iterator[ShotResult]:
        """Prune a model in place, shot by shot; see ``Loop.run``."""
        return run_shots(session, since)

    def phases(self, config: PruneConfig, shot: int) -> Iterator[tuple[str, str, float]]:
        """Phases of a shot: curvature, then selection and update of each step; see ``Loop.phases``."""
        steps = config.steps_per_shot
        yield phase_name(shot, config.shots, "curvature"), "curvature", 1.0
        for step in range(1, steps + 1):
            for name in ("selection", "update"):
                yield f"{_step_name(shot, config.shots, step, steps)}: {name}", name, 1 / steps

    def passes(self, config: PruneConfig) -> int:
        """Number of passes of one estimation without a warm start."""
        estimator = estimator_of(config)
        assert estimator is not None, "a global method has a curvature"
        return estimator.passes(estimation_of(config), warm=False)


def run_shots(session: Session, since: RunState | None = None) -> Iterator[ShotResult]:
    """Prune a model in place, shot by shot; yields after each shot, so that the caller can evaluate and save.

    Args:
        session: The run, whose model is dense, or as it was after the shot of ``since``.
        since: State of an earlier run of the same recipe; None begins with the first shot.

    Raises:
        ConfigError: If the layers do not allow the structure.
        NonFiniteError: If activations, gradients or costs are not finite.
        NotPositiveDefiniteError: If a factor cannot be decomposed even with more damping.
        TargetError: If the last shot misses the sparsity by more than one candidate's weights.
    """
    structure = structure_of(session.config, session.anatomy)
    done, start = 0, cast(WarmStart | None, None)
    if since is not None:
        done, start = since.shot, since.start
        structure.resume(since.masks)
    run = _Shots(session, structure, Stages(session))
    for number, sparsity in enumerate(session.config.sparsity_schedule[done:], start=done + 1):
        result = run.shot(number, sparsity, start)
        start = result.start
        yield result


@dataclass(frozen=True)
class _Step:
    """One step of a shot: its threshold, numbers of structures removed by cost and by implication, and its scores."""

    threshold: float
    removed: int
    implied: int
    costs: CostHistogram


@dataclass(frozen=True)
class _Shots:
    """All shots of one run."""

    session: Session
    structure: Structure
    stages: Stages

    def shot(self, number: int, sparsity: float, start: WarmStart | None) -> ShotResult:
        """Make one shot to a sparsity; a power iteration starts from ``start``."""
        structure, clock = self.structure, Clock(self.session.device)
        result = removals_of(self.session, number, clock, lambda: self._removed(number, sparsity, start, clock))
        structure.resume(result.masks)
        fitted = self.stages.run(Shot(number, structure.shapes, structure.element_masks), clock)
        return replace(result, stages=clock.records(fitted), profile=clock.profile())

    def _removed(self, number: int, sparsity: float, start: WarmStart | None, clock: Clock) -> ShotResult:
        """Make the removals of a shot; returns its result without stages."""
        structure, config = self.structure, self.session.config
        curvature = self._estimate(number, start, clock)
        steps = [
            self._step(curvature, target, clock, _step_name(number, config.shots, step, config.steps_per_shot))
            for step, target in enumerate(self._targets(sparsity), start=1)
        ]
        return ShotResult(
            shot=number,
            target_sparsity=sparsity,
            masks=structure.masks,
            threshold=steps[-1].threshold,
            removed=sum(step.removed for step in steps),
            implied=sum(step.implied for step in steps),
            factor_bytes=curvature.nbytes,
            loss=curvature.loss,
            costs=steps[-1].costs,
            start=curvature.warm_start(self.session.anatomy.layers, structure.shapes),
        )

    def _targets(self, sparsity: float) -> Iterator[int]:
        """Numbers of weights to be left after each step of a shot."""
        before = sum(mask.weights for mask in self.structure.masks.values())
        after, steps = self._left(sparsity), self.session.config.steps_per_shot
        return (before + round((after - before) * step / steps) for step in range(1, steps + 1))

    def _left(self, sparsity: float) -> int:
        """Number of weights to be left at a sparsity."""
        return round((1 - sparsity) * self.session.anatomy.prunable_weights)

    def _step(self, curvature: Curvature, target: int, clock: Clock, where: str) -> _Step:
        """Remove the cheapest candidates until ``target`` weights are left; ``where`` names the step for progress."""
        structure, layers = self.structure, len(self.session.anatomy.layers)
        with clock.phase("selection"), self.session.progress.phase(f"{where}: selection", layers, "layers") as phase:
            costs = self._costs(curvature, phase)
            selection = structure.select(costs, target)
            histogram = cost_histogram(structure.scored(costs, selection), structure.score_name, selection.threshold)
            del costs
            if target == self._left(self.session.config.sparsity):
                dense, what = self.session.anatomy.prunable_weights, self.session.config.structure
                _check_reached(selection.keep, target, selection.next_weights, dense, what)
        with clock.phase("update"), self.session.progress.phase(f"{where}: update", layers, "layers") as phase:
            self._update(curvature, selection, phase)
        return _Step(selection.threshold, selection.structures_chosen, selection.structures_implied, histogram)

    def _estimate(self, number: int, start: WarmStart | None, clock: Clock) -> Curvature:
        """Estimate the curvature of the model as it is, from the tokens of all processes."""
        session, config = self.session, self.session.config
        # Each shot draws its own labels and tokens.
        how = replace(estimation_of(config), seed=config.seed + number, order=session.order)
        work = session.own.input_ids.numel() * passes_needed(how, warm=start is not None)
        words = phase_name(number, config.shots, "curvature")
        with clock.phase("curvature"), session.progress.phase(words, work) as phase:
            return estimate(session, self.structure.shapes, how, phase.advance, start)

    @property
    def _damping(self) -> Damping:
        return Damping(self.session.config.dampening_a, self.session.config.dampening_g)

    def _share_out(self, compute: Callable[[LinearLayer], T]) -> Iterator[tuple[LinearLayer, T]]:
        """Compute something for each layer in one of the processes; decompositions are the work of a layer."""
        shapes, layers = self.structure.shapes, self.session.anatomy.layers.values()
        return self.session.share_out(layers, compute, lambda layer: decomposition_work(shapes[layer.name]))

    @torch.no_grad()
    def _costs(self, curvature: Curvature, phase: Phase) -> dict[str, Any]:
        structure, session = self.structure, self.session

        def costs_of(layer: LinearLayer) -> Any:
            fisher = curvature.fisher(layer, structure.shapes[layer.name], self._damping)
            with session.present(layer):
                return structure.costs(layer, read_matrix(session.model, layer), fisher)

        found = {}
        for layer, costs in self._share_out(costs_of):
            found[layer.name] = costs
            phase.advance(1)
        return {name: found[name] for name in session.anatomy.layers}

    @torch.no_grad()
    def _update(self, curvature: Curvature, selection: Any, phase: Phase) -> None:
        session = self.session
        before, after = self.structure.shapes, self.structure.shapes_after(selection)
        extents = session.anatomy.extents(after)

        def matrix_of(layer: LinearLayer) -> Tensor:
            # Made only when it is asked for: without a compensation, nothing needs its decomposition.
            fisher = partial(curvature.fisher, layer, before[layer.name], self._damping)
            with session.present(layer):
                return self.structure.matrix_after(layer, read_matrix(session.model, layer), fisher, selection)

        for layer, matrix in self._share_out(matrix_of):
            write_matrix(session.model, layer, after[layer.name], extents[layer.name], matrix)
            check_written(layer, core_of(session.model, layer))
            session.settle(layer)
            phase.advance(1)
        narrow_heads(session.model, session.anatomy, after)
        self.structure.commit(selection)


def _step_name(shot: int, shots: int, step: int, steps: int) -> str:
    """Words for a step of a shot, or for the shot if it has only one step."""
    return f"shot {shot}/{shots}{f', step {step}/{steps}' if steps > 1 else ''}"


def _check_reached(masks: Masks, target: int, next_weights: int, dense: int, structure: str) -> None:
    """Check that a run meets its sparsity, to within less than one candidate's weights.

    Args:
        masks: Masks of the layers after the last step of the last shot.
        target: Number of weights to be left.
        next_weights: Number of weights that the next candidate would have freed; 0 if there is none.
        dense: Number of weights of the dense layers.
        structure: Structure that the run removes, in the recipe's words.

    Raises:
        TargetError: If nothing is removed, or the target is missed by one candidate's weights or more.
    """
    left = sum(mask.weights for mask in masks.values())
    if left == dense or left - target > max(0, next_weights - 1):
        raise TargetError(
            f"{100 * (1 - left / dense):.3g} % of the prunable weights can be removed as {structure}, and "
            f"{100 * (1 - target / dense):.3g} % were to be: the next candidate has {next_weights:,} weights.",
            "Ask for another --sparsity, a lower --min-width or --round-to, or smaller structures.",
        )
