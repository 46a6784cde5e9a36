"""Measurement of a comparison's cells: the dense model once, and one variant pruned in memory against it.

This is the work within the process of a cell; see ``cell_process.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.comparison.variants import SHARED
from llm_surgeon.data.texts import Texts
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.errors import DataError, OutputError
from llm_surgeon.evaluation.divergence import perplexity_and_divergence, reference_states
from llm_surgeon.models import Anatomy
from llm_surgeon.models.loading import resolve_device
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.skeleton import loaded
from llm_surgeon.passes.head import Head
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import CellMeasures, DenseRecord
from llm_surgeon.run.job import report_of, run_job
from llm_surgeon.run.opening import open_checkpoint, without_evaluation
from llm_surgeon.system.files import in_place
from llm_surgeon.system.progress import Progress
from llm_surgeon.versions import versions


def measure_dense(
    model: str, config: PruneConfig, reference: Path, texts: str | None, progress: Progress
) -> DenseRecord:
    """Measure the dense model, and keep the hidden states that its predictions can be computed from.

    Args:
        model: A local directory, a hub id, or ``demo``.
        config: The recipe of any cell; only the options that all cells share matter.
        reference: File for the hidden states, as safetensors.
        texts: Digest that the tokens must have, if there are results already; None if there are none.
        progress: Display of the progress.

    Raises:
        DataError: If the texts do not have the digest.
        OutputError: If the states cannot be written.
        SurgeonError: If the model cannot be loaded or the texts cannot be read.
    """
    # A recipe that is impossible fails in its own cell.
    common = {name: getattr(config, name) for name in SHARED}
    opening = open_checkpoint(model, PruneConfig.from_mapping(common))
    prepared = opening.read_texts(texts).texts
    network, _ = loaded(opening.skeleton, opening.config, resolve_device(config.device), streamed=False)
    text = _evaluation(prepared)
    with progress.phase("dense: perplexity", text.work) as phase:
        measured, states = reference_states(network, text, phase.advance)
    try:
        with in_place(reference) as path:
            save_file({"states": states}, path)
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The dense model's hidden states, {states.nbytes / 2**20:.0f} MiB, cannot be written: {error}.",
            "Free some space, or give an --out on another disk.",
        ) from None
    return DenseRecord(
        perplexity=measured,
        calibration=prepared.calibration.provenance,
        texts=prepared.digest,
        versions=versions(),
    )


def measure_cell(
    model: str, config: PruneConfig, reference: Path, texts: str | None, progress: Progress
) -> CellMeasures:
    """Prune a model in memory and measure it against the dense one.

    Args:
        model: A local directory, a hub id, or ``demo``.
        config: The recipe.
        reference: File that ``measure_dense`` wrote.
        texts: Digest of the tokens in the dense model's record.
        progress: Display of the progress.

    Raises:
        DataError: If the texts have changed since the dense model was measured.
        SurgeonError: Any error of ``prune``.
    """
    opening = open_checkpoint(model, config)
    opened = opening.read_texts(texts)
    # Without a text the job does not evaluate after each shot: once at the end, with the divergence, is enough.
    job = without_evaluation(opened).load(opening.config, resolve_device(config.device), progress)
    network, anatomy = job.model, job.anatomy
    # Reordered channels reorder the head too, and the dense model's states are in their old order.
    dense_head = Head(network, own_copy=True) if config.permute else None
    report = report_of(run_job(job))
    text = _evaluation(opened.texts)
    states = _states(reference)
    with progress.phase("pruned: perplexity and divergence", text.work) as phase:
        measured, divergence = perplexity_and_divergence(network, text, states, phase.advance, dense_head)
    return CellMeasures(
        perplexity=measured,
        divergence=divergence,
        sparsity=_sparsity(network, anatomy),
        seconds=sum(shot.seconds for shot in report.shots),
        peak=report.memory.peak,
        calibration=report.calibration,
        versions=report.versions,
    )


def _states(reference: Path) -> Tensor:
    try:
        return load_file(reference)["states"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"The dense model's hidden states in {reference} cannot be read: {error}.",
            "Remove the file and run the command again.",
        ) from None


def _evaluation(texts: Texts) -> EvaluationText:
    return cast(EvaluationText, texts.evaluation)  # planning refuses recipes without one


def _sparsity(model: PreTrainedModel, anatomy: Anatomy) -> float:
    """Sparsity of the prunable layers, counted in the model itself and not taken from the run's report."""
    left = sum(int(torch.count_nonzero(core_of(model, layer).weight)) for layer in anatomy.layers.values())
    return 1 - left / anatomy.prunable_weights
