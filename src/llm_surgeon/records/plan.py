"""Records of a plan: sizes, memory and seconds of a run before it."""

from __future__ import annotations

from typing import Literal

from llm_surgeon.records.base import Record
from llm_surgeon.records.shot import Size


class LayerKind(Record):
    """Prunable layers of one kind and shape; ``layers`` counts them."""

    kind: str
    layers: int
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        """Weights of all of them, without biases."""
        return self.layers * self.rows * self.columns


class PlannedPhase(Record):
    """What one phase of a run will take: bytes at its peak, by what holds them, and seconds.

    ``device`` is empty if the run is on the CPU. ``reports`` says whether the peak of the phase enters that of the
    run's report, which begins with the loaded model and ends before the export.
    """

    name: str
    host: dict[str, int]
    device: dict[str, int]
    seconds: float
    reports: bool = True

    @property
    def host_bytes(self) -> int:
        """Bytes resident in the process."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of tensors on the GPU."""
        return sum(self.device.values())


class Plan(Record):
    """What a run will take and give, as far as it can be said before it. ``llm-surgeon plan --out`` is this record.

    Attributes:
        device: Where it is to run.
        kinds: What is pruned.
        dense_size: Before.
        size: After the last shot.
        dense_weight_bytes: Bytes of the dense weights as loaded.
        weight_bytes: Bytes of the weight files of the export.
        disk: Bytes of exports and checkpoints, at most at once.
        phases: In the order in which they first run; seconds are of all shots together.
        host_available: Bytes of memory that are free for the run, what this process has included.
        device_available: The same of the GPU; None without one.
        loaders: What can load the result.
        probed: Whether a batch was timed and measured; else time is that of a common machine.
        order: Of the passes, ``batch-major`` or ``layer-major``; what the recipe's ``auto`` comes to.
        store_host: Bytes of memory in which a layer-major run may let hidden states and factors wait; None: any.
        store_device: The same of the GPU.
        scratch: Bytes that will wait on disk in the meantime.
        streamed: Whether the weights of blocks are among them, and come one block at a time.
        processes: How many share the run; memory is that of each.
    """

    model: str
    family: str
    device: str
    kinds: tuple[LayerKind, ...]
    dense_size: Size
    size: Size
    dense_weight_bytes: int
    weight_bytes: int
    disk: int
    phases: tuple[PlannedPhase, ...]
    host_available: int
    device_available: int | None
    loaders: tuple[str, ...]
    probed: bool = False
    order: Literal["batch-major", "layer-major"] = "batch-major"
    store_host: int | None = None
    store_device: int | None = None
    scratch: int = 0
    streamed: bool = False
    processes: int = 1

    @property
    def host_peak(self) -> int:
        """Most bytes resident in the process, over all phases."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def device_peak(self) -> int:
        """Most bytes of tensors on the GPU, over all phases; 0 without one."""
        return max(phase.device_bytes for phase in self.phases)

    @property
    def peak(self) -> int:
        """What is to be compared with ``Memory.peak`` of the report."""
        reported = [phase for phase in self.phases if phase.reports]
        return max(phase.device_bytes if phase.device else phase.host_bytes for phase in reported)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.seconds for phase in self.phases)
