"""Probe of a machine: one real batch, timed and measured, as shapes alone say little about speed."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from llm_surgeon.curvature import estimate
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.skeleton import Skeleton, loaded
from llm_surgeon.passes.batch_major import Order
from llm_surgeon.planning.trace import traced_estimation
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.session.session import Session
from llm_surgeon.system.memory import peak_bytes, reset_peak


@dataclass(frozen=True)
class Probe:
    """Measures of one batch.

    Attributes:
        tokens: Number of tokens in the batch.
        seconds: Time of the batch.
        peak: Peak bytes: of the device if it is a GPU, else resident in the process.
    """

    tokens: int
    seconds: float
    peak: int


def probe_batch(
    skeleton: Skeleton,
    config: PruneConfig,
    device: torch.device,
    tokens: CalibrationTokens,
    order: Order,
    *,
    streamed: bool,
) -> Probe:
    """Load the model and run one batch twice. Only the second time counts, as kernels are chosen in the first.

    Args:
        skeleton: The model.
        config: The recipe.
        device: Device of the run.
        tokens: Calibration tokens.
        order: Order of the pass.
        streamed: Whether weights come one block at a time.

    Raises:
        ModelError: If the model cannot be loaded.
        NonFiniteError: If the loss is not finite.
    """
    network, anatomy = loaded(skeleton, config, device, streamed=streamed)
    ids, mask = next(iter(tokens.batches(config.sequences_per_pass)))
    batch = CalibrationTokens(ids, mask, {})
    reset_peak(device)
    for _ in range(2):
        start = time.perf_counter()
        how = replace(traced_estimation(config), order=order)
        estimate(Session(network, anatomy, batch, config), anatomy.dense_masks(), how)
        seconds = time.perf_counter() - start
    return Probe(ids.numel(), seconds, peak_bytes(device))
