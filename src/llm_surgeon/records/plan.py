"""Records of a plan: sizes, memory and seconds of a run, made before the run."""

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
        """Number of weights of all these layers, without biases."""
        return self.layers * self.rows * self.columns


class PlannedPhase(Record):
    """Plan of one phase of a run: bytes at its peak, by the name of each part, and seconds.

    ``device`` is empty if the run is on the CPU. ``reports`` says whether the peak of the phase enters the peak of the
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
    """Plan of a run: sizes, memory, disk and time before it starts. ``llm-surgeon plan --out`` is this record.

    Attributes:
        device: Device of the run.
        kinds: Prunable layers, by kind and shape.
        dense_size: Size of the dense model.
        size: Size of the model after the last shot.
        dense_weight_bytes: Bytes of the dense weights as loaded.
        weight_bytes: Bytes of the weight files of the export.
        disk: Largest bytes of exports and checkpoints at once.
        phases: Phases in the order in which they first run; seconds are of all shots together.
        host_available: Bytes of memory that are free for the run, with the bytes that this process already has.
        device_available: Bytes of the GPU that are free for the run; None without a GPU.
        loaders: Engines that can load the result.
        further: Formats that the recipe does not name, and that can say the result.
        quantising: Sentences on the quantised types of llama.cpp that the matrices fit.
        probed: Whether a batch was timed and measured; otherwise the time is for a common machine.
        order: Order of the passes, ``batch-major`` or ``layer-major``, also if the recipe says ``auto``.
        store_host: Bytes of memory in which hidden states and factors of a layer-major run may wait; None: any number.
        store_device: Bytes of the GPU in which they may wait; None: any number.
        scratch: Bytes that will wait on disk during the run.
        scratch_weights: Bytes of streamed weights among them.
        streamed: Whether the weights of blocks wait on disk too, and come one block at a time.
        processes: Number of processes that share the run; memory is for each of them.
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
    further: tuple[str, ...] = ()
    quantising: tuple[str, ...] = ()
    probed: bool = False
    order: Literal["batch-major", "layer-major"] = "batch-major"
    store_host: int | None = None
    store_device: int | None = None
    scratch: int = 0
    scratch_weights: int = 0
    streamed: bool = False
    processes: int = 1

    @property
    def host_peak(self) -> int:
        """Largest bytes resident in the process, over all phases."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def device_peak(self) -> int:
        """Largest bytes of tensors on the GPU, over all phases; 0 without a GPU."""
        return max(phase.device_bytes for phase in self.phases)

    @property
    def peak(self) -> int:
        """Peak bytes for comparison with ``Memory.peak`` of the report."""
        reported = [phase for phase in self.phases if phase.reports]
        return max(phase.device_bytes if phase.device else phase.host_bytes for phase in reported)

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        return sum(phase.seconds for phase in self.phases)
