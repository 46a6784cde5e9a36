"""Records of states inside a shot, from which a later process goes on."""

from __future__ import annotations

from llm_surgeon.records.base import Record
from llm_surgeon.records.shot import CostHistogram, Figure, StageRecord


class Spent(Record):
    """Time and memory of a shot so far.

    Attributes:
        stages: Stages of the shot in the order in which they first ran.
        profile: Seconds by kind of work.
    """

    stages: tuple[StageRecord, ...]
    profile: dict[str, float]


class RemovalMark(Record):
    """Removals of a shot that are done, before anything is fitted; see ``ShotResult`` for the figures."""

    shot: int
    target_sparsity: float
    threshold: float | None
    removed: int
    implied: int
    factor_bytes: int
    loss: float | None
    costs: CostHistogram | None
    spent: Spent


class DoneFit(Record):
    """A fit that is complete.

    Attributes:
        stage: Name of the stage.
        figures: Figures of the fit.
        note: Meaning of the figures.
    """

    stage: str
    figures: tuple[Figure, ...]
    note: str


class FitMark(Record):
    """State of the fits after a shot.

    Attributes:
        done: Fits that are complete, in order.
        turn: Number of the model of cross-fitting that the weights are of; None without cross-fitting, or after it.
        steps: Number of steps that the fit after these has taken.
        spent: Time and memory of the shot so far.
    """

    done: tuple[DoneFit, ...]
    turn: int | None
    steps: int
    spent: Spent


class NoWords(Record):
    """Words of a state that has none beside its tensors."""
