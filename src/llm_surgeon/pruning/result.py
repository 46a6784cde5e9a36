"""The result of one shot, whatever loop made it."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_surgeon.curvature import WarmStart
from llm_surgeon.pruning.structures import Masks
from llm_surgeon.records import CostHistogram, PruneReport, StageRecord


@dataclass(frozen=True)
class RunState:
    """State of a run after a shot: all that the next one needs beside the model.

    Attributes:
        shot: Number of the shot, from 1.
        masks: What is left, per layer.
        start: Factors from which a power iteration of the curvature sets out; None if there are none.
        report: Report up to the shot; None where nobody keeps one.
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
        target_sparsity: Share of the prunable weights that was to be gone.
        masks: What is left, per layer.
        threshold: The largest score removed; None if there is no common one.
        removed: Structures removed for their own cost.
        implied: Structures that died because a partner did.
        factor_bytes: Bytes of the statistics or factors that were held at once, at most.
        loss: Mean loss of the calibration tokens before the shot, if it was computed.
        costs: How the scores are distributed; None if layers are not compared with each other.
        stages: Stages of the shot in the order in which they first ran.
        profile: Seconds by what was done, see ``Clock.profile``.
        start: Factors from which a power iteration sets out in the next shot.
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
