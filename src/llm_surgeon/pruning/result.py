"""The result of one shot of any loop, and the state from which the next shot starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_surgeon.curvature import WarmStart
from llm_surgeon.pruning.structures import Masks
from llm_surgeon.records import CostHistogram, PruneReport, StageRecord


@dataclass(frozen=True)
class RunState:
    """State of a run after a shot: all that the next shot needs beside the model.

    Attributes:
        shot: Number of the shot, from 1.
        masks: Masks of what is left, by layer.
        start: Factors from which a power iteration of the curvature starts; None if there are none.
        report: Report up to the shot; None if no report is kept.
    """

    shot: int
    masks: Masks
    start: WarmStart | None = None
    report: PruneReport | None = None


@dataclass
class ShotResult:
    """The result of a shot: masks, scores, and its stages with their times.

    Attributes:
        shot: Number of the shot, from 1.
        target_sparsity: Share of the prunable weights that was to be removed.
        masks: Masks of what is left, by layer.
        threshold: Largest score removed; None if layers have no common threshold.
        removed: Number of structures removed for their own cost.
        implied: Number of structures that died because a partner did.
        factor_bytes: Largest number of bytes of statistics or factors that were held at once.
        loss: Mean loss of the calibration tokens before the shot, in nats; None if it was not computed.
        costs: Distribution of the scores; None if layers are not compared with each other.
        stages: Stages of the shot in the order in which they first ran.
        profile: Seconds by kind of work, see ``Clock.profile``.
        start: Factors from which a power iteration starts in the next shot; None if there are none.
    """

    shot: int
    target_sparsity: float
    masks: Masks
    threshold: float | None
    removed: int
    implied: int
    factor_bytes: int
    loss: float | None
    costs: CostHistogram | None
    stages: tuple[StageRecord, ...] = ()
    profile: dict[str, float] = field(default_factory=dict)
    start: WarmStart | None = None

    @property
    def state(self) -> RunState:
        """State of the run after the shot."""
        return RunState(self.shot, self.masks, self.start)
