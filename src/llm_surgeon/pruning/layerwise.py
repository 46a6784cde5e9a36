"""Layer-wise pruning: block after block, each on the outputs of the blocks already pruned.

Within a block, all layers are pruned by one set of statistics, taken before the first layer changes. Decisions that
concern several blocks (a global threshold, outlier-weighted budgets) are made before, in a survey of the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from llm_surgeon.curvature.layer_statistics import Watched, watch
from llm_surgeon.errors import ConfigError, NonFiniteError
from llm_surgeon.mathematics.dsnot import Refinement, refine
from llm_surgeon.mathematics.linalg import damping_of
from llm_surgeon.mathematics.owl import outlier_ratio, outlier_weighted
from llm_surgeon.mathematics.scores import SCORES, ScoreOptions, wanda
from llm_surgeon.mathematics.sparsegpt import inverse_factor, solve
from llm_surgeon.mathematics.unstructured_selection import ElementMask, keep_in_scope, select_elements
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.models.matrix import check_written, core_of
from llm_surgeon.models.permutation import check_residual
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.pruning.loop import Loop
from llm_surgeon.pruning.permuting import StreamOrder, reorder_block
from llm_surgeon.pruning.removals import removals_of
from llm_surgeon.pruning.result import RunState, ShotResult
from llm_surgeon.pruning.structures import check_structure
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.methods import LAYERWISE
from llm_surgeon.refit.stage import Shot
from llm_surgeon.refit.stages import Stages
from llm_surgeon.session.session import Session
from llm_surgeon.system.clock import Clock
from llm_surgeon.system.progress import Phase

T = TypeVar("T")


class BlockByBlock(Loop):
    """One shot that prunes block after block, each on the outputs of the blocks already pruned."""

    name = "layerwise"
    sweeps = True

    def run(self, session: Session, since: RunState | None = None) -> Iterator[ShotResult]:
        """Prune a model in place, in one shot; a run that continues after it has nothing to do. See ``Loop.run``."""
        return run_layerwise(session) if since is None else iter(())

    def phases(self, config: PruneConfig, shot: int) -> Iterator[tuple[str, str, float]]:
        """Phases of the shot, which progress shows as one; see ``Loop.phases``."""
        for name in ("curvature", "selection", "update"):
            yield _words(config), name, 1.0

    def passes(self, config: PruneConfig) -> int:
        """Number of passes: two, as each block is run before and after it is pruned."""
        return 2

    def watches_grams(self, config: PruneConfig) -> bool:
        """A solver needs the correlations of the inputs; scores do not."""
        return LAYERWISE[config.method].scope is None


def _words(config: PruneConfig) -> str:
    return f"{config.method}: block after block"


def run_layerwise(session: Session) -> Iterator[ShotResult]:
    """Prune a model in place by a layer-wise method; yields once.

    Args:
        session: The run; the hidden states of all tokens wait in its store, or in memory.

    Raises:
        ConfigError: If the layers do not allow the structure, or the budgets are out of bounds.
        NonFiniteError: If activations or scores are not finite.
        NotPositiveDefiniteError: If a Gram matrix cannot be decomposed even with more damping.
        UnsupportedModelError: If the recipe permutes channels, and the model does not allow it.
    """
    anatomy, config = session.anatomy, session.config
    check_structure(config, anatomy)
    if config.permute:
        check_residual(session.model, anatomy.family)
    clock = Clock(session.device)
    result = removals_of(session, 1, clock, lambda: _removed(session, clock))
    elements = {name: cast(ElementMask, mask).elements for name, mask in result.masks.items()}
    fitted = Stages(session).run(Shot(1, anatomy.dense_masks(), elements), clock)
    yield replace(result, stages=clock.records(fitted), profile=clock.profile())


def _removed(session: Session, clock: Clock) -> ShotResult:
    """Prune block after block; returns the result of the shot without stages."""
    anatomy, config = session.anatomy, session.config
    run = _Blocks(session, clock)
    passes = (2 * len(run.blocks) - 1) * (run.reads + run.surveys) + len(run.blocks) * (config.permute and run.reads)
    with session.progress.phase(_words(config), passes * session.own.input_ids.numel()) as phase:
        survey = run.survey(phase)
        kept = run.prune(survey, phase)
    masks = {name: ElementMask(mask) for name, mask in kept.items()}
    return ShotResult(
        shot=1,
        target_sparsity=config.sparsity,
        masks=masks,
        threshold=survey.threshold,
        removed=anatomy.prunable_weights - sum(mask.weights for mask in masks.values()),
        implied=0,
        factor_bytes=run.statistics_bytes,
        loss=None,
        costs=None,
    )


@dataclass(frozen=True)
class Survey:
    """Decisions that are made before the first block is pruned.

    Attributes:
        sparsity: Sparsity of the layers of each block.
        kept: Masks that a global threshold found, by layer; None if each layer finds its own.
        threshold: The global threshold; None if there is none.
    """

    sparsity: list[float]
    kept: Mapping[str, Tensor] | None = None
    threshold: float | None = None


class _Blocks:
    """The blocks of one run, and the steps that the recipe asks for."""

    def __init__(self, session: Session, clock: Clock) -> None:
        config = session.config
        self._model, self._anatomy, self._tokens, self._config = session.model, session.anatomy, session.own, config
        self._clock, self._store, self._processes = clock, session.store, session.processes
        self.blocks: list[list[LinearLayer]] = [[] for _ in cast(nn.ModuleList, self._block_list())]
        for layer in session.anatomy.layers.values():
            self.blocks[layer.block].append(layer)
        self._method = LAYERWISE[config.method]
        self._global = config.global_scope
        # A score may need no data, and a global score has read them in the survey. A refinement always needs data.
        self.reads = config.refine != "none" or (self._method.data and not self._global)
        self.surveys = config.layer_budget == "owl" or (self._method.data and (self._global or config.permute))
        self._options = ScoreOptions(
            config.score_alpha, config.score_norm, config.score_ratio, config.score_activation, config.seed
        )
        self.statistics_bytes = 0

    def survey(self, phase: Phase) -> Survey:
        """Decide on the dense model what concerns several blocks."""
        config = self._config
        if config.layer_budget == "owl":
            return Survey(self._outlier_weighted(phase))
        uniform = [config.sparsity] * len(self.blocks)
        if config.permute:
            self._reorder_stream(phase)
        if not self._global:
            return Survey(uniform)
        scores: dict[str, Tensor] = {}
        for _, layers, watched in self._visit(phase, reads=self.surveys):
            with self._clock.phase("selection"):
                scores |= {layer.name: self._score(layer, watched).cpu() for layer in layers}
        with self._clock.phase("selection"):
            dense = {name: ElementMask(torch.ones_like(score, dtype=torch.bool)) for name, score in scores.items()}
            left = round((1 - config.sparsity) * self._anatomy.prunable_weights)
            selection = select_elements(dense, scores, left)
        kept = {name: mask.elements for name, mask in selection.keep.items()}
        return Survey(uniform, kept, selection.threshold)

    def prune(self, survey: Survey, phase: Phase) -> dict[str, Tensor]:
        """Prune block after block, and return the masks ``[R, C]``, True = kept, on the CPU."""
        kept: dict[str, Tensor] = {}
        # A method without a scope is a solver, which needs the correlations of the inputs.
        solves, reorder = self._method.scope is None, self._config.permute
        for block, layers, watched in self._visit(phase, reads=self.reads, grams=solves, reorder=reorder):
            if solves:
                kept |= self._solve(layers, watched, survey.sparsity[block])
                continue
            mask_of = partial(self._mask, watched=watched, survey=survey, sparsity=survey.sparsity[block])
            with self._clock.phase("selection"):
                masks = dict(self._share_out(layers, mask_of))
            with self._clock.phase("update"):
                for name, mask in masks.items():
                    # Only the removed weights are written, so that the kept weights stay the same bit for bit.
                    weight = core_of(self._model, self._anatomy.layers[name]).weight.data
                    weight.masked_fill_(~mask.to(weight.device), 0.0)
                    kept[name] = mask.cpu()
        return kept

    def _share_out(self, layers: Sequence[LinearLayer], compute: Callable[[LinearLayer], T]) -> Iterator[tuple[str, T]]:
        """Compute something for each layer of a block, in one of the processes."""
        work = {layer.name: float(layer.rows**3 + layer.columns**3) for layer in layers}
        return self._processes.share_out(work, lambda name: compute(self._anatomy.layers[name]))

    def _visit(
        self, phase: Phase, *, reads: bool, grams: bool = False, reorder: bool = False
    ) -> Iterator[tuple[int, list[LinearLayer], Watched]]:
        """Visit block after block; changes that the caller makes to a block reach the inputs of the next one.

        Args:
            phase: Phase of the progress.
            reads: Whether to run the blocks for their statistics; otherwise the statistics are empty.
            grams: Whether to sum Gram matrices as well.
            reorder: Whether to reorder the channels inside each block before it is visited.

        Yields:
            Number of the block, its prunable layers, and their statistics.
        """
        sweep: Sweep | None = None
        if reads:
            with self._clock.phase("curvature"):
                family, config = self._anatomy.family, self._config
                sweep = Sweep(
                    self._model, family.blocks, self._tokens, config.sequences_per_pass, config.precision, self._store
                )
        for block, layers in enumerate(self.blocks):
            if reorder:
                self._reorder(layers, self._watch(sweep, block, phase))
            # After a reordering the block is run once more, which is simpler than to reorder its statistics.
            watched = self._watch(sweep, block, phase, grams)
            self.statistics_bytes = max(self.statistics_bytes, watched.nbytes)
            yield block, layers, watched
            weights_of(self._model).forget()
            if sweep is not None and block + 1 < len(self.blocks):
                with self._clock.phase("curvature"):
                    sweep.pass_through(block, phase.advance)

    def _watch(self, sweep: Sweep | None, block: int, phase: Phase, grams: bool = False) -> Watched:
        if sweep is None or not self.blocks[block]:
            return Watched()
        with self._clock.phase("curvature"):
            watched = watch(self._model, sweep, block, self.blocks[block], grams=grams, advance=phase.advance)
            watched.add_up(self._processes)
            return watched

    def _reorder_stream(self, phase: Phase) -> None:
        """Reorder the channels of the residual stream in the whole model."""
        assert self._config.pattern is not None
        order = StreamOrder(self._anatomy.family, self._config.pattern)
        for _, layers, watched in self._visit(phase, reads=self.surveys):
            with self._clock.phase("selection"):
                order.hear(layers, partial(self._score, watched=watched))
        with self._clock.phase("selection"):
            order.fold(self._model)

    def _reorder(self, layers: Sequence[LinearLayer], watched: Watched) -> None:
        """Reorder the neurons and value dimensions of a block."""
        assert self._config.pattern is not None
        with self._clock.phase("selection"):
            score = partial(self._score, watched=watched)
            reorder_block(self._model, self._anatomy.family, layers, score, self._config.pattern)

    def _score(self, layer: LinearLayer, watched: Watched) -> Tensor:
        """Scores ``[R, C]`` of a layer's weights, float32; solvers, which have no score, get Wanda's."""
        statistics = watched.statistics(layer)
        weight = self._weight(layer)
        if self._method.scope is None:
            return wanda(weight, statistics.input_norm)
        scores = SCORES[self._config.method](weight, statistics, self._options)
        if scores.shape != weight.shape or not bool(scores.isfinite().all()):
            raise NonFiniteError(
                f"The scores of {layer.name} are not finite, or not of its shape.",
                "Run with --precision float32 and --dtype float32, or check the score if it is your own.",
            )
        return scores

    def _mask(self, layer: LinearLayer, watched: Watched, survey: Survey, sparsity: float) -> Tensor:
        """Mask ``[R, C]`` of a layer's kept weights: the survey's or by its scores, refined if the recipe says so."""
        config = self._config
        weight = self._weight(layer)
        if survey.kept is not None:
            mask = survey.kept[layer.name].to(weight.device)
        else:
            rowwise = config.resolved_scope == "row"
            mask = keep_in_scope(self._score(layer, watched), sparsity, rowwise, config.pattern)
        if config.refine == "none":
            return mask
        moments, group = watched.inputs[layer.input_group], config.pattern.group if config.pattern else None
        return refine(weight, mask, moments.mean, moments.variance, moments.norm, _refinement(config), group)

    def _solve(self, layers: Sequence[LinearLayer], watched: Watched, sparsity: float) -> dict[str, Tensor]:
        """Prune a block by SparseGPT; layers that read the same input share the decomposition of its Gram matrix."""
        config, factors, kept = self._config, cast(dict[str, Tensor], {}), {}

        def solved(layer: LinearLayer) -> tuple[Tensor, Tensor]:
            if layer.input_group not in factors:
                gram = watched.mean_gram(layer)
                damping = damping_of(gram, config.dampening_a)
                factors[layer.input_group] = inverse_factor(gram, damping, f"{layer.name} (inputs)")
            weight, factor = self._weight(layer), factors[layer.input_group]
            solution = solve(weight, factor.to(weight), sparsity, config.pattern, config.sparsegpt_block)
            return solution.weight, solution.keep.cpu()

        with self._clock.phase("update"):
            for name, (weight, keep) in self._share_out(layers, solved):
                layer = self._anatomy.layers[name]
                core = core_of(self._model, layer)
                weights_of(self._model).write(core.weight, weight)
                check_written(layer, core)
                kept[name] = keep
        return kept

    def _outlier_weighted(self, phase: Phase) -> list[float]:
        """Sparsity of each block by the share of its outliers."""
        config, ratios = self._config, {}
        for block, layers, watched in self._visit(phase, reads=True):
            if layers:
                with self._clock.phase("selection"):
                    scores = [wanda(self._weight(layer), watched.statistics(layer).input_norm) for layer in layers]
                    ratios[block] = outlier_ratio(scores, config.owl_multiple)
        weights = [sum(layer.rows * layer.columns for layer in self.blocks[block]) for block in ratios]
        try:
            budgets = outlier_weighted([*ratios.values()], weights, config.sparsity, config.owl_spread)
            return [dict(zip(ratios, budgets, strict=True)).get(block, 0.0) for block in range(len(self.blocks))]
        except ValueError as error:
            raise ConfigError(
                f"The outlier-weighted budgets are out of bounds: {error}.", "Use a smaller --owl-spread."
            ) from None

    def _weight(self, layer: LinearLayer) -> Tensor:
        """Weights ``[R, C]`` of a layer without its bias, float32 at least."""
        core = core_of(self._model, layer)
        with weights_of(self._model).present(core):
            weight = core.weight.detach()
        return weight if weight.dtype == torch.float64 else weight.float()

    def _block_list(self) -> nn.Module:
        return self._model.get_submodule(self._anatomy.family.blocks)


def _refinement(config: PruneConfig) -> Refinement:
    return Refinement(
        reweight=config.refine_reweight if config.refine == "r2-dsnot" else None,
        alpha=config.score_alpha,
    )
