"""What one shot leaves behind, whatever kind of method it was."""

from __future__ import annotations

from dataclasses import dataclass, field

from llm_surgeon.pipeline.structures import Masks
from llm_surgeon.records import CorrectionRecord, CostHistogram


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
    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    profile: dict[str, float] = field(default_factory=dict)
