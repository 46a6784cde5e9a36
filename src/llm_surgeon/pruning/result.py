"""What one shot leaves behind, whatever kind of method it was."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_surgeon.curvature import WarmStart
from llm_surgeon.pruning.structures import Masks
from llm_surgeon.records import CorrectionRecord, CostHistogram, GatesRecord, ReconstructionRecord


@dataclass(frozen=True)
class RunState:
    """Where a run stands after a shot: all that the next one needs beside the model.

    Attributes:
        shot: Number of the shot, from 1.
        masks: What is left, per layer.
        start: What a power iteration of the curvature sets out from; None if there is none.
    """

    shot: int
    masks: Masks
    start: WarmStart | None = None


@dataclass
class ShotResult:
    """What a shot did: what is left, what its threshold was, and the seconds and peak bytes of its phases.

    ``profile`` divides the seconds by what was done, see ``Clock.profile``.

    Attributes:
        masks: What is left, per layer.
        threshold: The largest score removed; None if there is no common one.
        removed: Structures removed for their own cost.
        implied: Structures that died because a partner did.
        factor_bytes: Bytes of the statistics or factors that were held at once, at most.
        loss: Mean loss of the calibration tokens before the shot, if it was computed.
        costs: How the scores are distributed; None if layers are not compared with each other.
        start: What a power iteration sets out from in the next shot.
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
    correction: CorrectionRecord | None
    reconstruction: ReconstructionRecord | None = None
    gates: GatesRecord | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    profile: dict[str, float] = field(default_factory=dict)
    start: WarmStart | None = None

    @property
    def standing(self) -> RunState:
        """Where the run stands afterwards."""
        return RunState(self.shot, self.masks, self.start)
