"""What is fitted to the calibration text once a shot has removed something: reconstruction, and gates after it.

Reconstruction corrects many weights by few tokens, and so closely that these tokens say little of other text any more:
gates set by them correct errors that only they have. *Cross-fitting* avoids that. Each half of the sequences makes a
model of its own, reconstructed from the half and with gates that the other half sets, for which the model's errors are
those on any text. The mean of the weights of both models, which began as one and so have stayed near each other, has
less of the chance of either half, as the mean of two estimates does. Without gates it is that mean alone.
(Chernozhukov et al. 2018, "Double/debiased machine learning", call it so where the many parameters that are not asked
for are fitted to one half of the data, the few that are to the other, and the mean of both ways round is taken.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.curvature import Estimation
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.matrix import core_of
from llm_surgeon.passes.batch_major import Order
from llm_surgeon.passes.task import Task
from llm_surgeon.recipe.config import HALVES, PruneConfig
from llm_surgeon.records import GatesRecord, ReconstructionRecord, Record
from llm_surgeon.refit.gates import BACKWARD_PASSES, FORWARD_PASSES, gate_width, set_gates
from llm_surgeon.refit.last_norm import last_norm
from llm_surgeon.refit.reconstruction import DENSE_RUNS, PRUNED_RUNS, Reconstruction, reconstruct
from llm_surgeon.refit.resampled_text import with_copies
from llm_surgeon.system.clock import Clock
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.progress import Progress
from llm_surgeon.system.storage import TensorStore

R = TypeVar("R", bound=Record)
Records = tuple[ReconstructionRecord | None, GatesRecord | None]


@dataclass(frozen=True)
class Fitting:
    """Fits a model after each shot of a run.

    Attributes:
        model: The model that shots prune.
        dense: What reconstruction aims at; None without it.
        anatomy: Its layers.
        tokens: Calibration tokens of this process.
        config: The recipe.
        progress: Where progress is shown.
        store: Keeps what has to wait in layer-major passes; None makes them batch-major.
        processes: Who has the other tokens.
    """

    model: PreTrainedModel
    dense: PreTrainedModel | None
    anatomy: Anatomy
    tokens: CalibrationTokens
    config: PruneConfig
    progress: Progress
    store: TensorStore | None
    processes: Processes

    def after_shot(self, number: int, keep: Mapping[str, KeepMask], clock: Clock) -> Records:
        """Fit what the recipe wants to be fitted, in place.

        Args:
            number: Of the shot.
            keep: Rows and columns that are left; agrees with the model.
            clock: Measures ``reconstruction`` and ``gates``.
        """
        if not self.config.cross_fit:
            return self._reconstruct(number, keep, clock), self._set_gates(number, keep, clock)
        kept = [tensor.clone() for tensor in self._changing()]
        records = []
        for which in range(HALVES):
            reconstructed = self._reconstruct(number, keep, clock, which)
            records.append((reconstructed, self._set_gates(number, keep, clock, 1 - which)))
            if not which:
                # The second half begins where the first one did, and the model of the first waits in its place.
                self._exchange(kept)
        self._take_mean(kept)
        first, second = records
        return _mean_record(first[0], second[0]), _mean_record(first[1], second[1])

    def _reconstruct(
        self, number: int, keep: Mapping[str, KeepMask], clock: Clock, half: int | None = None
    ) -> ReconstructionRecord | None:
        """Correct what writes into the stream, by all sequences or by half of them."""
        config, dense = self.config, self.dense
        if dense is None:
            return None
        how = Reconstruction(config.reconstruction_ridge, config.sequences_per_pass, config.precision)
        with clock.phase("reconstruction"):
            # The copies are written, at most once, before progress is shown.
            copied = self._with_copies
            sequences = self.tokens.n_samples
            tokens = copied if half is None else _half(copied, half, sequences)
            work = tokens.input_ids.numel() * self.anatomy.blocks * (DENSE_RUNS + PRUNED_RUNS)
            with self.progress.phase(self._phase(number, "reconstruction", half), work) as phase:
                return reconstruct(
                    self.model,
                    dense,
                    self.anatomy,
                    keep,
                    tokens,
                    how,
                    text=tokens.n_samples // (1 + config.reconstruction_copies),
                    store=self.store,
                    processes=self.processes,
                    advance=phase.advance,
                )

    def _set_gates(
        self, number: int, keep: Mapping[str, KeepMask], clock: Clock, half: int | None = None
    ) -> GatesRecord | None:
        """Set the gates of heads and groups of neurons by the loss of the text, or of half of it."""
        config = self.config
        if not config.gate_steps:
            return None
        tokens = self.tokens if half is None else _half(self.tokens, half, self.tokens.n_samples)
        how = Estimation(config.sequences_per_pass, config.precision, order=self.order)
        work = tokens.input_ids.numel() * config.gate_steps * (BACKWARD_PASSES + FORWARD_PASSES)
        with clock.phase("gates"), self.progress.phase(self._phase(number, "gates", half), work) as phase:
            store = self.store or TensorStore(next(self.model.parameters()).device)
            task = Task(self.model, self.anatomy, keep, tokens, how, phase.advance, store, self.processes)
            return set_gates(task, config.gate_steps, config.gate_damping, gate_width(self.anatomy, config))

    def _phase(self, number: int, name: str, half: int | None) -> str:
        by = "" if half is None else f" by half {half + 1} of {HALVES}"
        return f"shot {number}/{self.config.shots}: {name}{by}"

    @property
    def order(self) -> Order:
        """Of passes that take gradients."""
        return "batch-major" if self.store is None else "layer-major"

    @cached_property
    def _with_copies(self) -> CalibrationTokens:
        """What reconstruction fits to: this process's part of the tokens, and copies of it."""
        config, copies = self.config, self.config.reconstruction_copies
        if not copies:
            return self.tokens
        assert self.dense is not None, "copies are for reconstruction"
        how = Estimation(config.sequences_per_pass, config.precision, seed=config.seed)
        work = copies * self.tokens.input_ids.numel()
        with self.progress.phase("copies of the calibration text", work) as phase:
            return with_copies(self.dense, self.tokens, copies, config.reconstruction_share, how, phase.advance)

    def _changing(self) -> list[Tensor]:
        """The parameters that are fitted, or may be."""
        modules = [core_of(self.model, layer) for layer in self.anatomy.layers.values()]
        norm = last_norm(self.model, self.anatomy)
        return [
            parameter.data for module in (*modules, norm) if module is not None for parameter in module.parameters()
        ]

    def _exchange(self, kept: list[Tensor]) -> None:
        """Put other tensors into the model, and what was there into these."""
        for own, tensor in zip(self._changing(), kept, strict=True):
            former = own.clone()
            own.copy_(tensor)
            tensor.copy_(former)

    def _take_mean(self, kept: list[Tensor]) -> None:
        """Put the mean of the model's tensors and others into it."""
        for own, tensor in zip(self._changing(), kept, strict=True):
            own.copy_((own.float() + tensor.float()) / HALVES)


def _half(tokens: CalibrationTokens, which: int, sequences: int) -> CalibrationTokens:
    """Every second sequence, with its copies; which ones does not depend on how processes share them.

    Args:
        tokens: Sequences of this process, all of them once or, with copies, several times.
        which: Whether to take those with even numbers among all processes, 0, or with odd ones, 1.
        sequences: How many sequences this process has, copies not counted.
    """
    rows = torch.arange(tokens.n_samples) % sequences
    chosen = (tokens.first + rows) % HALVES == which
    mask = None if tokens.attention_mask is None else tokens.attention_mask[chosen]
    return CalibrationTokens(tokens.input_ids[chosen], mask, tokens.provenance, tokens.first)


def _mean_record(first: R | None, second: R | None) -> R | None:
    """One record for both halves: means of its fractions; its counts are those of either."""
    if first is None or second is None:
        return None
    fractions = {name: (value + getattr(second, name)) / HALVES for name, value in first if isinstance(value, float)}
    return first.model_copy(update=fractions)
