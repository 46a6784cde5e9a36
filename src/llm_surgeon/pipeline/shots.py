"""The global multi-shot loop (paper, Alg. 2): curvature, costs, threshold, update, and again."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.config import PruneConfig
from llm_surgeon.curvature import Curvature, Estimation, NearestCurvature, WarmStart, estimate, passes_needed
from llm_surgeon.curvature.passes import Order
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.fisher import Damping
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.matrix import core_of, narrow_heads, read_matrix, write_matrix
from llm_surgeon.pipeline.clock import Clock
from llm_surgeon.pipeline.corrections import correct_shot
from llm_surgeon.pipeline.histogram import cost_histogram
from llm_surgeon.pipeline.result import ShotResult, Standing
from llm_surgeon.pipeline.solving import check_written
from llm_surgeon.pipeline.structures import Masks, Structure, structure_of
from llm_surgeon.processes import ALONE, Processes
from llm_surgeon.report.progress import Progress
from llm_surgeon.storage import TensorStore

logger = logging.getLogger(__name__)

# Candidates are never divided: a few large ones may leave such a share of the weights unremoved.
_COARSE = 0.02


def run_shots(
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokens: CalibrationTokens,
    config: PruneConfig,
    progress: Progress,
    store: TensorStore | None = None,
    processes: Processes = ALONE,
    *,
    since: Standing | None = None,
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

    Raises:
        ConfigError: If the layers do not allow the structure.
        NonFiniteError: If activations, gradients or costs are not finite.
        NotPositiveDefiniteError: If a factor cannot be decomposed even with more damping.
    """
    structure = structure_of(config, anatomy)
    own = tokens.part(processes.part(tokens.n_samples))
    done, previous = 0, cast(WarmStart | None, None)
    if since is not None:
        done, previous = since.shot, since.start
        structure.resume(since.masks)
    for number, sparsity in enumerate(config.sparsity_schedule[done:], start=done + 1):
        clock = Clock(next(model.parameters()).device)
        how = _estimation(config, number, "batch-major" if store is None else "layer-major")
        work = own.input_ids.numel() * passes_needed(how, warm=previous is not None)
        with clock.phase("curvature"), progress.phase(f"shot {number}/{config.shots}: curvature", work) as phase:
            curvature = estimate(
                model,
                anatomy,
                structure.shapes,
                own,
                how,
                phase.advance,
                previous,
                store=store,
                processes=processes,
            )
        with clock.phase("selection"):
            costs = _all_costs(model, anatomy, structure, curvature, config, processes)
            target = round((1 - sparsity) * anatomy.prunable_weights)
            selection = structure.select(costs, target)
            histogram = cost_histogram(structure.scored(costs, selection), structure.score_name, selection.threshold)
            del costs
            _warn_if_short(structure.masks, selection.keep, target)
        with clock.phase("update"):
            _update(model, anatomy, structure, curvature, selection, config, processes)
        corrected = correct_shot(
            model, anatomy, structure.element_masks, tokens, config, number, clock, progress, processes
        )
        previous = None
        # Only a power iteration has use for what the last shot found.
        if isinstance(curvature, NearestCurvature):
            previous = curvature.warm_start(anatomy.layers, structure.shapes)
        result = ShotResult(
            shot=number,
            target_sparsity=sparsity,
            masks=structure.masks,
            threshold=selection.threshold,
            removed=selection.structures_chosen,
            implied=selection.structures_implied,
            factor_bytes=curvature.nbytes,
            loss=curvature.loss,
            costs=histogram,
            correction=corrected,
            seconds=clock.seconds,
            peaks=clock.peaks,
            profile=clock.profile(),
            start=previous,
        )
        # The factors would stay until the next are complete.
        del curvature
        yield result


def _warn_if_short(before: Masks, after: Masks, target: int) -> None:
    """Say so if a shot removes less than half of what it should.

    Args:
        before: What was left.
        after: What is left.
        target: Weights that should be.
    """
    was, left = (sum(mask.weights for mask in masks.values()) for masks in (before, after))
    if left - target > max((was - target) / 2, _COARSE * was):
        logger.warning(
            "%s weights are removed instead of %s: the next candidates, all of equal cost together, would be too many; "
            "costs are equal where weights are zero or layers have no effect",
            f"{was - left:,}",
            f"{was - target:,}",
        )


def _estimation(config: PruneConfig, shot: int, order: Order) -> Estimation:
    assert config.resolved_curvature is not None  # layer-wise methods do not come here
    return Estimation(
        batch_size=config.batch_size,
        precision=config.precision,
        curvature=config.resolved_curvature,
        sampled_labels=config.fisher_samples if config.fisher == "true" else 0,
        iterations=config.kronecker_iterations,
        # Each shot draws its own labels.
        seed=config.seed + shot,
        order=order,
    )


@torch.no_grad()
def _all_costs(
    model: PreTrainedModel,
    anatomy: Anatomy,
    structure: Structure,
    curvature: Curvature,
    config: PruneConfig,
    processes: Processes,
) -> dict[str, Any]:
    damping = Damping(config.dampening_a, config.dampening_g)

    def costs_of(name: str) -> Any:
        layer = anatomy.layers[name]
        return structure.costs(
            layer, read_matrix(model, layer), curvature.fisher(layer, structure.shapes[name], damping)
        )

    found = dict(processes.share_out(_work(structure), costs_of))
    return {name: found[name] for name in anatomy.layers}


def _work(structure: Structure) -> dict[str, float]:
    """What layers take to compute, in proportion: a decomposition for each side of a matrix."""
    return {name: float(sum(size**3 for size in keep.shape)) for name, keep in structure.shapes.items()}


@torch.no_grad()
def _update(
    model: PreTrainedModel,
    anatomy: Anatomy,
    structure: Structure,
    curvature: Curvature,
    selection: Any,
    config: PruneConfig,
    processes: Processes,
) -> None:
    damping = Damping(config.dampening_a, config.dampening_g)
    before, after = structure.shapes, structure.shapes_after(selection)
    extents = anatomy.extents(after)

    def matrix_of(name: str) -> Tensor:
        layer = anatomy.layers[name]
        # Not made yet: where nothing is compensated for, its decomposition would be for nothing.
        fisher = partial(curvature.fisher, layer, before[name], damping)
        return structure.matrix_after(layer, read_matrix(model, layer), fisher, selection)

    for name, matrix in processes.share_out(_work(structure), matrix_of):
        write_matrix(model, anatomy.layers[name], after[name], extents[name], matrix)
        check_written(anatomy.layers[name], core_of(model, anatomy.layers[name]))
    narrow_heads(model, anatomy, after)
    structure.commit(selection)
