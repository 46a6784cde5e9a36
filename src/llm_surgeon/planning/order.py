"""Order in which a pass takes the calibration tokens, and places where its tensors wait."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from llm_surgeon.curvature import estimator_of
from llm_surgeon.errors import ConfigError
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.models.streaming import can_stream
from llm_surgeon.passes.batch_major import Order
from llm_surgeon.planning.trace import factor_bytes, traced_estimation
from llm_surgeon.pruning.loops import loop_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.refit.stages import stages_of
from llm_surgeon.system.storage import Budgets


@dataclass(frozen=True)
class Waiting:
    """Largest bytes that wait at once in the store of a run that goes layer by layer, by place.

    Attributes:
        device: Bytes on the device, where it is a GPU.
        host: Bytes in main memory.
        disk: Bytes on disk.
        stages: The same for each stage, by its name.
    """

    device: int = 0
    host: int = 0
    disk: int = 0
    stages: Mapping[str, Waiting] = field(default_factory=dict)

    def of_stage(self, name: str) -> Waiting:
        """Bytes that wait while a stage works."""
        return self.stages.get(name, Waiting())

    @property
    def most_on_disk(self) -> int:
        """Most bytes on disk in any phase."""
        return max([self.disk, *(stage.disk for stage in self.stages.values())])


@dataclass(frozen=True)
class Available:
    """Bytes that a run may hold of main memory and, if it runs on one, of the GPU."""

    host: int
    device: int | None


def waiting_bytes(skeleton: Skeleton, config: PruneConfig) -> int:
    """Largest bytes that the phases of a shot have in the store at once, if the run goes layer by layer.

    When the backward pass begins, the store holds the hidden states of all blocks, and no sums. When it ends, the store
    holds all sums, and no hidden states. Gradients are there once for each draw of labels.
    """
    how, estimator = traced_estimation(config), estimator_of(config)
    states = skeleton.state_bytes(config.samples * config.seq_len)
    factors = factor_bytes(skeleton.network, skeleton.anatomy, config)
    if estimator is None or not estimator.backward:
        return states * 2 + factors
    sums = factors if estimator.puts_away else 0
    return max(states * skeleton.anatomy.blocks, sums) + states * (1 + max(1, how.sampled_labels))


def passes_of(config: PruneConfig) -> int:
    """Number of passes over the tokens for the curvature of a shot."""
    return loop_of(config).passes(config)


def goes_layer_major(config: PruneConfig, room: Available, need: Callable[[], tuple[int, int]]) -> bool:
    """Whether a run goes layer by layer: by its loop, by the recipe, or because batch by batch it would not fit.

    Args:
        config: The recipe.
        room: Bytes that are available.
        need: Function that gives the bytes of main memory and of the GPU at the peak of a batch-major pass.
    """
    sweeps = loop_of(config).sweeps
    if sweeps or config.order != "auto" or not passes_of(config):
        return sweeps or config.order == "layer-major"
    host, device = need()
    return host > room.host or (room.device is not None and device > room.device)


def goes_streamed(config: PruneConfig, room: Available, layer_major: bool, floor: tuple[int, int]) -> bool:
    """Whether the weights of blocks come one block at a time.

    Args:
        config: The recipe.
        room: Bytes that are available.
        layer_major: Whether the run goes layer by layer.
        floor: Bytes of main memory and of the GPU that the shots take with all weights, without a store.
    """
    if config.weights != "auto":
        return config.weights == "streamed"
    # A run without a pass has no order, and can always stream.
    by_layers = layer_major or not passes_of(config)
    host, device = floor
    short = host > room.host or (room.device is not None and device > room.device)
    return short and by_layers and can_stream() and all(stage.streams for stage in stages_of(config))


def budgets_of(
    config: PruneConfig, room: Available, floor: tuple[int, int], slack: float, processes: int = 1
) -> Budgets:
    """Budgets of a store: the memory that is left beside everything else.

    Args:
        config: The recipe of one process.
        room: Bytes that are available to the process.
        floor: Bytes of main memory and of the GPU that the shots take without the store.
        slack: Bytes that the allocator of the host holds beside each byte in use.
        processes: Number of processes that share the main memory.

    Raises:
        ConfigError: If the run exceeds a limit of the recipe even with an empty store.
    """
    for asked, option, least in zip(
        (config.host_memory, config.device_memory), ("--host-memory", "--device-memory"), floor, strict=True
    ):
        if asked is not None and least > asked:
            shared = processes if option == "--host-memory" else 1
            raise ConfigError(
                f"Even layer by layer the run needs about {shared * least / 2**30:.2f} GiB"
                f"{f' in {shared} processes' if shared > 1 else ''}, and {option} is "
                f"{shared * asked / 2**30:.2f} GiB.",
                f"Raise {option}, or use a smaller --batch-size or --dtype bfloat16"
                f"{', or --no-reconstruction' if config.reconstruction else ''}.",
            )
    host, device = floor
    left = math.inf if room.device is None else max(0.0, room.device - device)
    return Budgets(device=left, host=max(0.0, (room.host - host) / (1 + slack)))


def placed(total: int, budgets: Budgets, device: torch.device) -> Waiting:
    """Places of ``total`` bytes that wait: the device first, then the host, then the disk."""
    on_device = 0 if device.type == "cpu" else int(min(total, budgets.device))
    on_host = int(min(total - on_device, budgets.host))
    return Waiting(on_device, on_host, total - on_device - on_host)


def order_name(layer_major: bool) -> Order:
    """Name of an order, as an estimation spells it."""
    return "layer-major" if layer_major else "batch-major"
