"""Peak memory of the phases of a run, part by part.

The passes are traced (``trace.py``), factors and weights counted. Constants stand for what belongs to no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from llm_surgeon.config import PruneConfig
from llm_surgeon.evaluation.memory import available_bytes
from llm_surgeon.planning.sizes import weight_bytes
from llm_surgeon.planning.skeleton import Skeleton
from llm_surgeon.planning.trace import Traces, factor_bytes

Parts = dict[str, int]

# Bytes that the C allocator holds beside each byte of tensors in use: freed space between them that is too small for
# the next, and kernels of the matrix libraries. Measured, see benchmarks/results/memory.md.
SLACK = 0.25
# Square matrices that one layer's costs or update need at once beside its factors: two factors whole, their damped
# copies, decompositions and inverses.
SQUARES = 6
# Bytes per prunable weight while single weights are chosen: float32 costs and their bit patterns, both halves of
# these, and masks before, after and of what goes.
ELEMENT_BYTES = 4 + 4 + 4 + 3
# A process that uses a GPU: its libraries and context on the host.
GPU_PROCESS = 2 * 2**30
# The fresh process of the reload check, without the weights that it loads.
RELOAD_PROCESS = 450 * 2**20


@dataclass(frozen=True)
class Need:
    """Bytes of one phase at its peak, by what holds them."""

    host: Parts
    device: Parts


def needs_of(
    skeleton: Skeleton, config: PruneConfig, device: torch.device, traces: Traces, process: int
) -> dict[str, Need]:
    """What each phase of a run needs, in the order in which they first run.

    Args:
        skeleton: The model.
        config: The recipe.
        device: Where the run is to be.
        traces: What its passes take.
        process: Bytes that the process holds before the model is loaded.
    """
    return _Model(skeleton, config, device, traces, process).needs()


def passes_within(measured: int, skeleton: Skeleton, factors: int, device: torch.device, process: int) -> int:
    """What a pass takes beside weights and factors, so that the need of its phase comes out as it was measured.

    Args:
        measured: Peak bytes of a pass: of the device if it is a GPU, else of the process.
        skeleton: The model.
        factors: Bytes of the factors.
        device: Where it was measured.
        process: Bytes that the process held before.
    """
    if device.type != "cpu":
        return max(0, measured - skeleton.weight_bytes - factors)
    return max(0, round((measured - process - skeleton.weight_bytes) / (1 + SLACK)) - factors)


class _Model:
    """The parts of all phases; ``device`` decides which of them are on the host."""

    def __init__(
        self, skeleton: Skeleton, config: PruneConfig, device: torch.device, traces: Traces, process: int
    ) -> None:
        self._skeleton, self._config, self._device = skeleton, config, device
        self._traces, self._process = traces, process
        self._weights, self._prunable = skeleton.weight_bytes, skeleton.anatomy.prunable_weights
        self._converts = skeleton.stored != skeleton.dtype
        largest = max(max(layer.rows, layer.columns + layer.bias) for layer in skeleton.anatomy.layers.values())
        self._squares: Parts = {"decompositions": SQUARES * largest**2 * 4}

    def needs(self) -> dict[str, Need]:
        """All phases."""
        config, evaluates = self._config, self._config.evaluation != "none"
        window: Parts = {"passes": self._traces.evaluation}
        needs = {"load": self._load()}
        if evaluates:
            needs["dense evaluation"] = self._on_device(window)
        needs |= self._shot()
        if config.lora:
            needs["correction"] = self._on_device({"passes": self._traces.training, **self._adapters()})
        if evaluates:
            needs["evaluation"] = self._on_device({**window, **self._pruned()})
        needs["export and check"] = self._export()
        if config.parts:
            needs["speed"] = self._on_device(self._pruned(), apart={"dense model once more": self._weights})
        return needs

    def _load(self) -> Need:
        """Files are mapped, so they are resident only as far as they are read; another type makes a copy."""
        files: Parts = {"weight files while read": self._skeleton.stored_bytes} if self._converts else {}
        weights: Parts = {"weights": self._weights}
        return Need({"process": self._process, **weights, **files}, {} if self._device.type == "cpu" else weights)

    def _shot(self) -> dict[str, Need]:
        """At their largest, which is in the first shot or, with small matrices beside the dense ones, the second."""
        factors, passes = self._statistics()
        later = self._pruned() if self._config.shots > 1 else {}
        masks: Parts = {} if self._config.parts else {"masks": self._prunable}
        costs: Parts = {} if self._config.parts else {"costs of single weights": ELEMENT_BYTES * self._prunable}
        return {
            "curvature": self._on_device({**factors, **passes, **later}, masks),
            "selection": self._on_device({**factors, **self._squares, **later}, costs),
            "update": self._on_device({**factors, **self._squares, **self._pruned()}, masks),
        }

    def _statistics(self) -> tuple[Parts, Parts]:
        """What is held of the calibration tokens, and what reading them takes beside that."""
        traces, config = self._traces, self._config
        if config.layerwise:
            batches = -(-config.samples // config.batch_size)
            return {"hidden states": traces.waiting * batches}, {"passes": traces.watching}
        factors = factor_bytes(self._skeleton.network, self._skeleton.anatomy, config)
        return {"factors": factors}, {"passes": traces.curvature}

    def _adapters(self) -> Parts:
        """Low-rank factors in float32, with gradients and two moments."""
        sides = sum(layer.rows + layer.columns for layer in self._skeleton.anatomy.layers.values())
        return {"adapters": 4 * 4 * self._config.lora_rank * sides, **self._pruned()}

    def _export(self) -> Need:
        """The reload check is a process of its own, but it takes the same memory."""
        last = weight_bytes(self._skeleton, self._config, self._config.sparsity)
        need = self._on_device(self._pruned(), apart={"weights of the reload check": last})
        return Need({**need.host, "process of the reload check": RELOAD_PROCESS}, need.device)

    def _pruned(self) -> Parts:
        """The small matrices beside the dense ones: on a CPU, a mapped file stays as long as any part of it is used."""
        if not self._config.parts or self._device.type != "cpu" or self._converts:
            return {}
        first = self._config.sparsity_schedule[0]
        return {"pruned weights": round((1 - first) * self._prunable) * self._skeleton.dtype.itemsize}

    def _on_device(self, tensors: Parts, on_host: Parts | None = None, apart: Parts | None = None) -> Need:
        """Weights and tensors where the run is, with what the allocator holds beside the tensors.

        Args:
            tensors: Where the run is.
            on_host: What is on the host in any case.
            apart: Where the run is, but not from the allocator's free space: files that are mapped, other processes.
        """
        on_host, apart = on_host or {}, apart or {}
        if self._device.type != "cpu":
            host = {"process": self._process + GPU_PROCESS, **on_host}
            return Need(host, {"weights": self._weights, **tensors, **apart})
        held = {**tensors, **on_host}
        slack = round(SLACK * sum(held.values()))
        return Need({"process": self._process, "weights": self._weights, **held, **apart, "allocator": slack}, {})


def process_bytes() -> int:
    """Bytes that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def host_available() -> int:
    """Bytes that this process may come to hold."""
    return available_bytes(torch.device("cpu")) + process_bytes()
