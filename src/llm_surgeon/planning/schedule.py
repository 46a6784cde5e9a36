"""How a run will go: in which order, with which weights at a time, and what waits where."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from llm_surgeon.curvature import estimator_of
from llm_surgeon.data.texts import Texts
from llm_surgeon.models.skeleton import Skeleton, weightless
from llm_surgeon.passes.batch_major import Order
from llm_surgeon.planning.memory import (
    SLACK,
    MemoryModel,
    PhaseMemory,
    passes_within,
    peak_of_shots,
    process_bytes,
    weights_read,
    weights_streamed,
)
from llm_surgeon.planning.order import (
    Available,
    Waiting,
    budgets_of,
    goes_layer_major,
    goes_streamed,
    order_name,
    placed,
    waiting_bytes,
)
from llm_surgeon.planning.probe import Probe, probe_batch
from llm_surgeon.planning.trace import Traces, trace
from llm_surgeon.pruning.loops import loop_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.system.storage import Budgets
from llm_surgeon.system.torchrun import Place


@dataclass(frozen=True)
class Schedule:
    """How a run will go.

    Attributes:
        traces: What its passes hold.
        layer_major: Whether it goes layer by layer.
        order: Of what is traced: layer-wise methods, which go layer by layer, are traced apart.
        streamed: Whether the weights of blocks come one block at a time.
        waiting: What waits in the store, and where; None without one, zeros before it is placed.
        budgets: What the store may take.
    """

    traces: Traces
    layer_major: bool
    order: Order
    streamed: bool = False
    waiting: Waiting | None = None
    budgets: Budgets = field(default_factory=Budgets)


class Scheduler:
    """What decides how one process of a run goes."""

    def __init__(
        self, skeleton: Skeleton, config: PruneConfig, device: torch.device, texts: Texts, room: Available, place: Place
    ) -> None:
        """Take what has been decided already.

        Args:
            skeleton: The model without its weights.
            config: The recipe as the process works on it.
            device: Where the process is to be.
            texts: Of the run.
            room: What is free for the process.
            place: The process.
        """
        self._skeleton, self._config, self._device, self._texts = skeleton, config, device, texts
        self._room, self._place = room, place
        self._process, self._weights = process_bytes(), weights_read(skeleton, device, texts)

    def way(self) -> Schedule:
        """Order and streaming, by what the run would need otherwise."""
        way = Schedule(self._traced("batch-major"), False, "batch-major")
        layer_major = goes_layer_major(self._config, self._room, lambda: self._peak(way))
        if layer_major:
            order = order_name(not loop_of(self._config).sweeps)
            traces = way.traces if order == way.order else self._traced(order)
            way = Schedule(traces, True, order, waiting=Waiting())
        return replace(way, streamed=goes_streamed(self._config, self._room, layer_major, self._peak(way)))

    def probed(self, way: Schedule) -> tuple[Schedule, Probe]:
        """Time and measure one batch; the memory of a pass is then as measured, where the probe's pass is the run's."""
        config = self._config
        probe = probe_batch(
            self._skeleton, config, self._device, self._texts.calibration, way.order, streamed=way.streamed
        )
        # A nearest product holds other factors than the pass that stands in for its own.
        estimator = estimator_of(config)
        own = estimator is not None and estimator.stand_in is None
        if way.traces.curvature and not way.layer_major and own:
            passes = passes_within(probe.peak, self._skeleton, config, self._device, self._process, self._weights)
            way = replace(way, traces=replace(way.traces, curvature=passes))
        return way, probe

    def with_store(self, way: Schedule) -> Schedule:
        """Budgets of the store, and what will wait where.

        Raises:
            ConfigError: If the run needs more memory than the recipe allows.
        """
        if not way.layer_major:
            return way
        budgets = budgets_of(self._config, self._room, self._peak(way), SLACK, self._place.local_count)
        return replace(
            way, budgets=budgets, waiting=placed(waiting_bytes(self._skeleton, self._config), budgets, self._device)
        )

    def needs(self, way: Schedule) -> dict[str, PhaseMemory]:
        """Memory by phase."""
        held = weights_streamed(self._skeleton, self._device)[0] if way.streamed else self._weights
        return MemoryModel(
            self._skeleton, self._config, self._device, way.traces, self._process, held, way.waiting, way.streamed
        ).needs()

    def _peak(self, way: Schedule) -> tuple[int, int]:
        return peak_of_shots(self.needs(way))

    def _traced(self, order: Order) -> Traces:
        skeleton, device = self._skeleton, self._device
        return trace(lambda: weightless(skeleton, device), skeleton.anatomy, self._config, device, order)
