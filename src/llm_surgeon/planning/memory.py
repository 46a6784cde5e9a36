"""Peak memory of the phases of a run, part by part.

The passes are traced (``trace.py``), factors and weights are counted, and constants stand for memory that belongs to no
tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import psutil
import torch
from torch import Tensor

from llm_surgeon.curvature import estimator_of
from llm_surgeon.data.texts import Texts
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.passes.head import CHUNK
from llm_surgeon.planning.order import Waiting
from llm_surgeon.planning.sizes import stored_parameters
from llm_surgeon.planning.trace import Traces, factor_bytes
from llm_surgeon.pruning.loops import loop_of
from llm_surgeon.recipe.config import HALVES, PruneConfig
from llm_surgeon.recovery.preparing import TRAINED_BYTES
from llm_surgeon.refit.stage import Stage
from llm_surgeon.refit.stages import STAGES, stages_of
from llm_surgeon.system.allocator import freed_bytes
from llm_surgeon.system.memory import available_bytes

Parts = dict[str, int]

# Bytes that the C allocator holds beside each byte that a pass has in use at its peak: freed space between its tensors
# that is too small for the next. Factors lie in one piece, and leave none. Measured, see benchmarks/results/memory.md.
GAPS = 0.42
# Bytes beside each byte that waits in main memory, whose tensors come and go. Measured in the same way.
SLACK = 0.19
# Bytes of the kernels of the matrix libraries.
LIBRARIES = 70 * 2**20
# Number of float32 chunks of logits, the largest tensors, that stay as freed space after large batches of a pruned
# model, whose small matrices lie between the tensors. Measured in the same way.
LOGITS_LEFT = 4
# Number of chunks of logits from which on a batch leaves such space; two chunks leave none.
LARGE = 3
# Bytes of the pieces in which the kernel reads a mapped file around the byte that is asked for.
READ_AROUND = 2**16
# Number of square matrices that one layer's costs or update need at once beside its factors: two whole factors, their
# damped copies, decompositions and inverses.
SQUARES = 6
# Bytes per prunable weight during the choice of single weights: float32 costs, their bit patterns, both halves of the
# patterns, and three masks: before, after, and of the removed weights.
ELEMENT_BYTES = 4 + 4 + 4 + 3
# Parts that the work of one block takes and gives back, the largest of their kind.
WORK = ("passes", "decompositions")
# Bytes of the libraries and the context on the host in a process that uses a GPU.
GPU_PROCESS = 2 * 2**30
# Bytes of the fresh process of the reload check, without the weights that it loads.
RELOAD_PROCESS = 450 * 2**20


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes of one phase at its peak, by the name of each part, on the host and on the GPU."""

    host: Parts
    device: Parts


# Name of the phase of the training after the last shot.
RECOVERY = "recovery"
# Name of the part with the dense model's weights that stages need.
DENSE_COPY = "dense weights for stages"
# Phases of a shot before its stages.
SHOT_PHASES = ("curvature", "selection", "update")


def peak_of_shots(needs: Mapping[str, PhaseMemory]) -> tuple[int, int]:
    """Most bytes of main memory and of the GPU in the phases of shots."""
    phases = [need for name, need in needs.items() if name in {*SHOT_PHASES, *STAGES}]
    return max(sum(p.host.values()) for p in phases), max(sum(p.device.values()) for p in phases)


def weights_read(skeleton: Skeleton, device: torch.device, texts: Texts) -> int:
    """Bytes of the weights that a run on these texts has in memory.

    On a CPU, weights of the stored type stay in the mapped file until they are read. If the input embedding is not tied
    to the output embedding, only the rows of the texts' tokens are read.
    """
    embedding = cast(Tensor, skeleton.network.get_input_embeddings().weight)
    head = skeleton.network.get_output_embeddings()
    if device.type != "cpu" or skeleton.converts or head.weight is embedding:
        return skeleton.weight_bytes
    row = embedding.shape[1] * skeleton.dtype.itemsize
    ids = [texts.calibration.input_ids.flatten()] + ([texts.evaluation.tokens] if texts.evaluation else [])
    pieces = len(torch.unique(torch.cat(ids) * row // READ_AROUND))
    whole = embedding.numel() * skeleton.dtype.itemsize
    return skeleton.weight_bytes - max(0, whole - pieces * max(row, READ_AROUND))


def _counts_of_blocks(skeleton: Skeleton) -> list[int]:
    blocks = skeleton.network.get_submodule(skeleton.anatomy.family.blocks)
    return [sum(parameter.numel() for parameter in block.parameters()) for block in blocks.children()]


def weights_streamed(skeleton: Skeleton, device: torch.device) -> tuple[int, int]:
    """Bytes of streamed weights, where the model runs and on disk.

    On a GPU two blocks count, as one block is copied while another is run.
    """
    counts = _counts_of_blocks(skeleton)
    away = sum(counts) * skeleton.dtype.itemsize
    there = max(counts) if device.type == "cpu" else max(map(sum, pairwise(counts)), default=max(counts))
    return skeleton.weight_bytes - away + there * skeleton.dtype.itemsize, away


def weights_on_disk(skeleton: Skeleton, config: PruneConfig, device: torch.device) -> int:
    """Most bytes of streamed weights in files, with those of the dense model and of the other half's model."""
    _there, away = weights_streamed(skeleton, device)
    pruned = round((1 - config.sparsity_schedule[0]) * skeleton.anatomy.prunable_weights) * skeleton.dtype.itemsize
    dense = any(stage.needs_dense for stage in stages_of(config))
    return away + pruned * (dense + (HALVES if config.cross_fit else 1) - 1)


def passes_within(
    measured: int, skeleton: Skeleton, config: PruneConfig, device: torch.device, process: int, weights: int
) -> int:
    """Bytes of a pass beside weights and factors, with which the plan of a first shot agrees with a measured peak.

    Args:
        measured: Peak bytes of a pass: of the device if it is a GPU, else of the process.
        skeleton: The model.
        config: The recipe.
        device: Device of the measurement.
        process: Bytes that the process held before.
        weights: Bytes of the weights in memory.
    """
    factors = factor_bytes(skeleton.network, skeleton.anatomy, config)
    if device.type != "cpu":
        return max(0, measured - weights - factors)
    return max(0, round((measured - process - weights - factors - LIBRARIES) / (1 + GAPS)))


def logits_left(skeleton: Skeleton, config: PruneConfig) -> int:
    """Bytes of freed space that passes with gradients of a pruned model cannot use again, on a CPU."""
    if math.ceil(config.sequences_per_pass * (config.seq_len - 1) / CHUNK) < LARGE:
        return 0
    vocabulary: int = skeleton.network.get_output_embeddings().weight.shape[0]
    return LOGITS_LEFT * CHUNK * vocabulary * 4


@dataclass(frozen=True)
class MemoryModel:
    """Model of a run's memory; ``device`` decides which parts are on the host.

    Attributes:
        skeleton: The model.
        config: The recipe.
        device: Device of the run.
        traces: Bytes of the passes.
        process: Bytes that the process holds before the model is loaded.
        weights: Bytes of the weights that will be in memory, see ``weights_read``.
        waiting: Bytes that wait in the store if the run goes layer by layer; None if it does not.
        streamed: Whether the weights of blocks come one block at a time.
        processes: Number of processes, which share the weights while they train.
    """

    skeleton: Skeleton
    config: PruneConfig
    device: torch.device
    traces: Traces
    process: int
    weights: int
    waiting: Waiting | None = None
    streamed: bool = False
    processes: int = 1

    @property
    def _sweeps(self) -> bool:
        return loop_of(self.config).sweeps

    @property
    def _squares(self) -> Parts:
        largest = max(max(layer.rows, layer.columns + layer.bias) for layer in self.skeleton.anatomy.layers.values())
        return {"decompositions": SQUARES * largest**2 * 4}

    @property
    def _prunable(self) -> int:
        return self.skeleton.anatomy.prunable_weights

    def needs(self) -> dict[str, PhaseMemory]:
        """Memory of each phase, in the order in which they first run."""
        config, evaluates = self.config, self.config.evaluates
        window: Parts = {"passes": self.traces.evaluation}
        needs = {"load": self._load()}
        if evaluates:
            needs["dense evaluation"] = self._on_device(window)
        needs |= self._shot()
        needs |= {stage.name: self._stage(stage) for stage in stages_of(config)}
        if evaluates:
            needs["evaluation"] = self._on_device({**window, **self._pruned()})
        needs["export and check"] = self._export()
        if config.parts and not self.streamed:
            needs["speed"] = self._on_device(self._pruned(), apart={"dense model once more": self.weights})
        if config.recover_tokens is not None:
            needs[RECOVERY] = self._recovery()
        return needs

    def _recovery(self) -> PhaseMemory:
        """Memory of the training after the last shot, for which both models are loaded anew."""
        trained = stored_parameters(self.skeleton, self.config, self.config.sparsity)
        tensors: Parts = {
            "dense weights": self.skeleton.weight_bytes // self.processes,
            "weights, gradients and moments": TRAINED_BYTES * trained // self.processes,
            "activations": max(self.traces.curvature, self.traces.evaluation),
        }
        if self.device.type == "cpu":
            return PhaseMemory({"process": self.process, **tensors}, {})
        return PhaseMemory({"process": self.process + GPU_PROCESS}, tensors)

    def _load(self) -> PhaseMemory:
        """Memory of loading: mapped files are resident only as far as they are read, and another type makes a copy."""
        copied = self.skeleton.converts and not self.streamed
        files: Parts = {"weight files while read": self.skeleton.stored_bytes} if copied else {}
        weights: Parts = {"weights": self.weights}
        return PhaseMemory({"process": self.process, **weights, **files}, {} if self.device.type == "cpu" else weights)

    def _shot(self) -> dict[str, PhaseMemory]:
        """Largest memory of a shot's phases: the first shot's or, with small beside dense matrices, the second's."""
        passes, larger = self._passes(), self._held()
        masks: Parts = {} if self.config.parts else {"masks": self._prunable}
        estimator = estimator_of(self.config)
        again = self.config.shots > 1 and estimator is not None and estimator.backward
        freed = self._freed() if again else {}
        return {
            "curvature": self._on_device({**passes, **larger}, masks | self._on_host(), freed),
            "selection": self._on_device({**self._squares, **larger}, self._costs() | self._on_host()),
            "update": self._on_device(
                {**self._squares, **self._statistics(), **self._pruned()}, masks | self._on_host()
            ),
        }

    def _costs(self) -> Parts:
        """Bytes of the costs of single weights: of all layers, or of one if a method compares within layers."""
        if self.config.parts:
            return {}
        layers = [layer.rows * layer.columns for layer in self.skeleton.anatomy.layers.values()]
        apart = self._sweeps and not self.config.global_scope
        return {"costs of single weights": ELEMENT_BYTES * (max(layers) if apart else sum(layers))}

    def _freed(self) -> Parts:
        """Freed bytes that passes with gradients leave in a pruned model: in the second shot, and for gates."""
        left = logits_left(self.skeleton, self.config)
        return {"freed logits": left} if left and self.device.type == "cpu" else {}

    def _passes(self) -> Parts:
        """Bytes of the passes over the tokens, beside the statistics that are held."""
        return {"passes": self.traces.watching if self._sweeps else self.traces.curvature}

    def _held(self) -> Parts:
        """Bytes of statistics and of the pruned matrices of the shot before: the larger of the first two shots."""
        first, pruned = self._statistics(), self._pruned() if self.config.shots > 1 else {}
        # Factors have become about as much smaller as the weights.
        kept = 1 - self.config.sparsity_schedule[0]
        second = {part: round(kept * size) for part, size in first.items()} | pruned
        return max(first, second, key=lambda parts: sum(parts.values()))

    def _statistics(self) -> Parts:
        """Bytes of the calibration tokens' statistics in the first shot, where the model runs."""
        estimator = estimator_of(self.config)
        if self.waiting is not None:
            kept = self._sweeps or (estimator is not None and estimator.puts_away)
            waiting = _part(self._store, self.waiting.device)
            return waiting if kept else {**waiting, **self._factors()}
        return self._factors()

    def _factors(self) -> Parts:
        return {"factors": factor_bytes(self.skeleton.network, self.skeleton.anatomy, self.config)}

    def _on_host(self) -> Parts:
        """Bytes of the store that wait on the host."""
        return {} if self.waiting is None else _part(self._store, self.waiting.host)

    @property
    def _store(self) -> str:
        return "hidden states" if self._sweeps else "hidden states and factors"

    def _stage(self, stage: type[Stage]) -> PhaseMemory:
        """Memory of a stage after a shot: its own, and parts that follow from its attributes."""
        tensors = {**stage.memory(self.skeleton, self.config, self.traces), **self._pruned()}
        if stage.decomposes:
            tensors |= self._squares
        if stage.half != "whole":
            tensors |= self._other_half()
        freed = self._freed() if stage.backward else {}
        if self.waiting is None:
            held = stage.waiting(self.skeleton, self.config, "batch-major")
            return self._on_device(tensors | _part(stage.waits, held), None, freed)
        waiting = self.waiting.of_stage(stage.name)
        return self._on_device(tensors | _part(self._store, waiting.device), _part(self._store, waiting.host), freed)

    def _other_half(self) -> Parts:
        """Largest bytes of the weights of one half's model that are kept while the other half's model is fitted."""
        if not self.config.cross_fit or self.streamed:
            return {}
        kept = 1 - self.config.sparsity_schedule[0]
        return {"weights of the other half": round(kept * self._prunable * self.skeleton.dtype.itemsize)}

    def _goal(self) -> Parts:
        """Bytes of the dense model that stages need beside the pruned one, in all shots and until the run ends."""
        copy = self._prunable * self.skeleton.dtype.itemsize
        needed = any(stage.needs_dense for stage in stages_of(self.config))
        return {DENSE_COPY: copy} if needed and not self.streamed else {}

    def _export(self) -> PhaseMemory:
        """Memory of the export and its reload check, which is a process of its own but on the same machine."""
        process = {"process of the reload check": RELOAD_PROCESS}
        if self.streamed:
            # The export is checked on the CPU, layer by layer out of the mapped file.
            largest = max(layer.rows * layer.columns for layer in self.skeleton.anatomy.layers.values())
            outside = self.skeleton.parameters - sum(_counts_of_blocks(self.skeleton))
            process["weights of the reload check"] = (outside + largest) * self.skeleton.dtype.itemsize
            need = self._on_device(self._pruned())
            return PhaseMemory({**need.host, **process}, need.device)
        last = stored_parameters(self.skeleton, self.config, self.config.sparsity) * self.skeleton.dtype.itemsize
        need = self._on_device(self._pruned(), apart={"weights of the reload check": last})
        return PhaseMemory({**need.host, **process}, need.device)

    def _pruned(self) -> Parts:
        """Bytes of the small matrices beside the dense ones, as a mapped file stays while any part of it is used."""
        if not self.config.parts or self.device.type != "cpu" or self.skeleton.converts or self.streamed:
            return {}
        first = self.config.sparsity_schedule[0]
        return {"pruned weights": round((1 - first) * self._prunable) * self.skeleton.dtype.itemsize}

    def _on_device(self, tensors: Parts, on_host: Parts | None = None, apart: Parts | None = None) -> PhaseMemory:
        """Memory of weights and tensors where the model runs, and of the allocator beside the tensors.

        Args:
            tensors: Bytes of tensors where the model runs.
            on_host: Bytes on the host in any case.
            apart: Bytes where the model runs that the allocator has no part in: mapped files, other processes.
        """
        on_host, apart = on_host or {}, self._goal() | (apart or {})
        if self.device.type != "cpu":
            host = {"process": self.process + GPU_PROCESS, **on_host}
            return PhaseMemory(host, {"weights": self.weights, **tensors, **apart})
        held = {**tensors, **on_host}
        slack = int(GAPS * held.get("passes", 0) + SLACK * held.get(self._store, 0)) + LIBRARIES
        return PhaseMemory({"process": self.process, "weights": self.weights, **held, **apart, "allocator": slack}, {})


def _part(name: str, size: int) -> Parts:
    """A part of a phase's memory, if it has any bytes."""
    return {name: size} if size else {}


def process_bytes() -> int:
    """Bytes that this process holds now, without freed memory, which the next tensors take first."""
    return int(psutil.Process().memory_info().rss) - freed_bytes()


def host_available() -> int:
    """Bytes that this process may come to hold."""
    return available_bytes(torch.device("cpu")) + process_bytes()
