"""The global multi-shot loop (paper, Alg. 2): curvature, costs, threshold, update, and again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from llm_surgeon.config import PruneConfig
from llm_surgeon.curvature import Curvature, Estimation, NearestCurvature, estimate, passes_needed
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.evaluation.memory import peak_device_bytes, peak_resident_bytes, reset_peak
from llm_surgeon.fisher import Damping
from llm_surgeon.models.family import Anatomy
from llm_surgeon.models.matrix import read_matrix, write_matrix
from llm_surgeon.pipeline.corrections import Corrections, correct
from llm_surgeon.pipeline.histogram import cost_histogram
from llm_surgeon.pipeline.structures import Masks, Structure, structure_of
from llm_surgeon.records import CorrectionRecord, CostHistogram
from llm_surgeon.report.progress import Progress


@dataclass
class ShotResult:
    """What a shot did: what is left, what its threshold was, and the seconds and peak bytes of its phases.

    Attributes:
        masks: What is left, per layer.
        removed: Structures removed for their own cost.
        implied: Structures that died because a partner did.
        predicted_loss: Sum of the costs of what was removed, in nats.
        loss: Mean loss of the calibration tokens before the shot, if they were read.
    """

    shot: int
    target_sparsity: float
    masks: Masks
    threshold: float
    removed: int
    implied: int
    factor_bytes: int
    loss: float | None
    costs: CostHistogram
    correction: CorrectionRecord | None
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)


def run_shots(
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokens: CalibrationTokens,
    config: PruneConfig,
    progress: Progress,
) -> Iterator[ShotResult]:
    """Prune a model in place, shot by shot; yields after each, so that the caller can evaluate and save.

    Curvature is estimated afresh in each shot, on the model as pruned so far.

    Raises:
        ConfigError: If the layers do not allow the structure.
        NonFiniteError: If activations, gradients or costs are not finite.
        NotPositiveDefiniteError: If a factor cannot be decomposed even with more damping.
    """
    structure = structure_of(config, anatomy)
    previous: Curvature | None = None
    for number, sparsity in enumerate(config.sparsity_schedule, start=1):
        clock = Clock(next(model.parameters()).device)
        how = _estimation(config, number)
        work = tokens.input_ids.numel() * passes_needed(how, warm=previous is not None)
        with clock.phase("curvature"), progress.phase(f"shot {number}/{config.shots}: curvature", work) as phase:
            curvature = estimate(model, anatomy, structure.shapes, tokens, how, phase.advance, previous)
        with clock.phase("selection"):
            costs = _all_costs(model, anatomy, structure, curvature, config)
            selection = structure.select(costs, round((1 - sparsity) * anatomy.prunable_weights))
            histogram = cost_histogram(structure.scored(costs, selection), structure.score_name, selection.threshold)
            del costs
        with clock.phase("update"):
            _update(model, anatomy, structure, curvature, selection, config)
        corrected = _correct(model, anatomy, structure, tokens, config, number, clock, progress)
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
        )
        # Only a power iteration has use for the last shot's factors; others would stay until the next are complete.
        previous = curvature if isinstance(curvature, NearestCurvature) else None
        del curvature
        yield result


class Clock:
    """Seconds and peak bytes of the phases of a shot."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._device = device

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block."""
        reset_peak(self._device)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peaks[name] = peak_bytes(self._device)


def peak_bytes(device: torch.device) -> int:
    """Peak of the device if it is a GPU, else of the process's resident memory, since the last reset."""
    return peak_device_bytes(device) if device.type == "cuda" else peak_resident_bytes()


def _estimation(config: PruneConfig, shot: int) -> Estimation:
    return Estimation(
        batch_size=config.batch_size,
        precision=config.precision,
        curvature=config.resolved_curvature,
        sampled_labels=config.fisher_samples if config.fisher == "true" else 0,
        iterations=config.kronecker_iterations,
        # Each shot draws its own labels.
        seed=config.seed + shot,
    )


@torch.no_grad()
def _all_costs(
    model: PreTrainedModel, anatomy: Anatomy, structure: Structure, curvature: Curvature, config: PruneConfig
) -> dict[str, Any]:
    damping = Damping(config.dampening_a, config.dampening_g)
    return {
        name: structure.costs(
            layer, read_matrix(model, layer), curvature.fisher(layer, structure.shapes[name], damping)
        )
        for name, layer in anatomy.layers.items()
    }


@torch.no_grad()
def _update(
    model: PreTrainedModel,
    anatomy: Anatomy,
    structure: Structure,
    curvature: Curvature,
    selection: Any,
    config: PruneConfig,
) -> None:
    damping = Damping(config.dampening_a, config.dampening_g)
    before, after = structure.shapes, structure.shapes_after(selection)
    for name, layer in anatomy.layers.items():
        # Not made yet: where nothing is compensated for, its decomposition would be for nothing.
        fisher = partial(curvature.fisher, layer, before[name], damping)
        matrix = structure.matrix_after(layer, read_matrix(model, layer), fisher, selection)
        write_matrix(model, anatomy, layer, after[name], matrix)
    structure.commit(selection)


def _correct(
    model: PreTrainedModel,
    anatomy: Anatomy,
    structure: Structure,
    tokens: CalibrationTokens,
    config: PruneConfig,
    shot: int,
    clock: Clock,
    progress: Progress,
) -> CorrectionRecord | None:
    """First-order corrections after a shot, longer after the last, if the recipe wants any."""
    if not config.lora:
        return None
    how = Corrections(
        rank=config.lora_rank,
        learning_rate=config.lora_learning_rate,
        steps=config.lora_final_steps if shot == config.shots else config.lora_steps,
        share=config.lora_share,
    )
    work = how.steps * config.batch_size * tokens.seq_len
    with clock.phase("correction"), progress.phase(f"shot {shot}/{config.shots}: correction", work) as phase:
        return correct(
            model,
            anatomy,
            structure.element_masks,
            tokens,
            how,
            batch_size=config.batch_size,
            precision=config.precision,
            # Other sequences and other random factors in each shot.
            seed=config.seed + shot,
            advance=phase.advance,
        )
