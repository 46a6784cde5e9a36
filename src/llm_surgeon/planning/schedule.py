"""Schedule of a run: the order of its passes, the weights that are loaded at a time, and the places of its store."""

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
from llm_surgeon.refit.stages import stages_of
from llm_surgeon.system.storage import Budgets
from llm_surgeon.system.torchrun import Place


@dataclass(frozen=True)
class Schedule:
    """Schedule of a run.

    Attributes:
        traces: Bytes of the passes.
        layer_major: Whether the run goes layer by layer.
        order: Order of the traced passes; the passes of layer-wise methods are traced in a way of their own.
        streamed: Whether the weights of blocks come one block at a time.
        waiting: Bytes that wait in the store, by place; None without a store, zeros before the places are known.
        budgets: Bytes that the store may take.
    """

    traces: Traces
    layer_major: bool
    order: Order
    streamed: bool = False
    waiting: Waiting | None = None
    budgets: Budgets = field(default_factory=Budgets)


class Scheduler:
    """Scheduler of one process of a run."""

    def __init__(
        self, skeleton: Skeleton, config: PruneConfig, device: torch.device, texts: Texts, room: Available, place: Place
    ) -> None:
        """Take the decisions that have been made already.

        Args:
            skeleton: The model without its weights.
            config: The recipe of the process.
            device: Device of the process.
            texts: Texts of the run.
            room: Bytes that are available to the process.
            place: Place of the process among those that share the run.
        """
        self._skeleton, self._config, self._device, self._texts = skeleton, config, device, texts
        self._room, self._place = room, place
        self._process, self._weights = process_bytes(), weights_read(skeleton, device, texts)

    def way(self) -> Schedule:
        """Decide on order and streaming, by the memory that the run would need without them."""
        way = Schedule(self._traced("batch-major"), False, "batch-major")
        layer_major = goes_layer_major(self._config, self._room, lambda: self._peak(way))
        if layer_major:
            order = order_name(not loop_of(self._config).sweeps)
            traces = way.traces if order == way.order else self._traced(order)
            way = Schedule(traces, True, order, waiting=Waiting())
        return replace(way, streamed=goes_streamed(self._config, self._room, layer_major, self._peak(way)))

    def probed(self, way: Schedule) -> tuple[Schedule, Probe]:
        """Time and measure one batch, and put the measured memory into the schedule if the run has the same pass."""
        config = self._config
        probe = probe_batch(
            self._skeleton, config, self._device, self._texts.calibration, way.order, streamed=way.streamed
        )
        # An estimator with a stand-in holds other factors than the pass of the probe.
        estimator = estimator_of(config)
        own = estimator is not None and estimator.stand_in is None
        if way.traces.curvature and not way.layer_major and own:
            passes = passes_within(probe.peak, self._skeleton, config, self._device, self._process, self._weights)
            way = replace(way, traces=replace(way.traces, curvature=passes))
        return way, probe

    def with_store(self, way: Schedule) -> Schedule:
        """The schedule with the budgets of the store, and the places of the bytes that wait.

        Raises:
            ConfigError: If the run needs more memory than the recipe allows.
        """
        if not way.layer_major:
            return way
        budgets = budgets_of(self._config, self._room, self._peak(way), SLACK, self._place.local_count)
        skeleton, config, order = self._skeleton, self._config, order_name(way.layer_major)
        waiting = placed(waiting_bytes(skeleton, config), budgets, self._device)
        of_stages = {stage.name: stage.waiting(skeleton, config, order) for stage in stages_of(config)}
        stages = {name: placed(total, budgets, self._device) for name, total in of_stages.items()}
        return replace(way, budgets=budgets, waiting=replace(waiting, stages=stages))

    def needs(self, way: Schedule) -> dict[str, PhaseMemory]:
        """Memory of each phase."""
        held = weights_streamed(self._skeleton, self._device)[0] if way.streamed else self._weights
        return MemoryModel(
            self._skeleton,
            self._config,
            self._device,
            way.traces,
            self._process,
            held,
            way.waiting,
            way.streamed,
            self._place.count,
        ).needs()

    def _peak(self, way: Schedule) -> tuple[int, int]:
        return peak_of_shots(self.needs(way))

    def _traced(self, order: Order) -> Traces:
        # Without a GPU tensors of one cannot be made, not even without numbers; on the CPU passes are about as large.
        there = self._device.type == "cpu" or torch.cuda.is_available()
        skeleton, device = self._skeleton, self._device if there else torch.device("cpu")
        return trace(lambda: weightless(skeleton, device), skeleton.anatomy, self._config, device, order)
