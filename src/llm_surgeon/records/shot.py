"""Records of one shot: its size, its stages, its layers, the scores of its candidates."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llm_surgeon.records.base import Record
from llm_surgeon.records.evaluation import Perplexity


class Size(Record):
    """Parameter counts of a model. ``prunable`` counts weights without biases, ``total`` all parameters once."""

    prunable: int
    total: int


class LayerRecord(Record):
    """Size of one linear layer after the run: kept and original rows and columns, and the number of kept weights."""

    name: str
    block: int
    kind: str
    rows: int
    columns: int
    rows_dense: int
    columns_dense: int
    weights: int

    @property
    def weights_dense(self) -> int:
        """Number of weights of the dense layer."""
        return self.rows_dense * self.columns_dense

    @property
    def kept(self) -> float:
        """Fraction of the layer's weights that is kept."""
        return self.weights / self.weights_dense


class CostHistogram(Record):
    """Distribution of the scores of all candidates of a shot, kept and removed.

    Attributes:
        score: Name of the score that ranks the candidates, for the axis: ``cost per weight freed`` or ``cost``.
        exponents: ``bins + 1`` edges of the bins, as powers of ten, ascending.
        kept: Number of kept candidates in each bin.
        removed: Number of candidates in each bin that went, for their own score or because a partner did.
        outside: Number of candidates with a score of zero, which has no place on a logarithmic axis.
        threshold: Largest score removed.
    """

    score: str
    exponents: tuple[float, ...]
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    outside: int
    threshold: float


class Figure(Record):
    """One number that a stage reports of itself.

    Attributes:
        name: Words for the heading of a column.
        value: The number; None if the shot has none.
        kind: Way of writing the number: as a count, a share of one, a loss in nats, or a plain number.
    """

    name: str
    value: float | None
    kind: Literal["count", "share", "loss", "number"] = "number"


class StageRecord(Record):
    """One stage of a shot: curvature, selection, update, a stage that fits the weights left, or the evaluation.

    Attributes:
        name: Name of the stage.
        seconds: Time of the stage.
        peak: Peak bytes: of the device if it is a GPU, else resident in the process.
        figures: Numbers that the stage reports of itself.
        note: Meaning of the figures, in one or two sentences.
        reports: Whether the stage only reports on a shot, and so is no part of its time.
    """

    name: str
    seconds: float
    peak: int = 0
    figures: tuple[Figure, ...] = ()
    note: str = ""
    reports: bool = False

    def __getitem__(self, name: str) -> float | None:
        """The value of a figure.

        Raises:
            KeyError: If the stage has no figure of this name.
        """
        for figure in self.figures:
            if figure.name == name:
                return figure.value
        raise KeyError(name)


class ShotRecord(Record):
    """One shot: its target, its removals, and its stages with their times and figures.

    Attributes:
        shot: Number of the shot, from 1.
        target_sparsity: Share of the prunable weights that was to be removed.
        sparsity: Share of the prunable weights that is removed.
        size: Parameters that are left.
        threshold: Largest score removed; None for layer-wise methods that compare nothing across layers.
        structures_removed: Number of structures removed for their own score.
        structures_implied: Number of structures that went because a partner did.
        loss: Mean loss of the calibration tokens before the shot, in nats; None if it was not computed.
        stages: Stages of the shot in the order in which they first ran.
        perplexity: Perplexity after the shot; None if it was not measured.
        costs: Distribution of the scores of all candidates; None for layer-wise methods.
        profile: Seconds by kind of work: model pass, factor sums, decomposition, transfers and so on.
    """

    shot: int
    target_sparsity: float
    sparsity: float
    size: Size
    threshold: float | None
    structures_removed: int
    structures_implied: int
    loss: float | None
    stages: tuple[StageRecord, ...] = ()
    perplexity: Perplexity | None = None
    costs: CostHistogram | None = None
    profile: dict[str, float] = Field(default_factory=dict)

    def stage(self, name: str) -> StageRecord | None:
        """The stage of a name; None if the shot had none."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def seconds_of(self, name: str) -> float:
        """Seconds of a stage; 0 if the shot had no stage of this name."""
        return sum(stage.seconds for stage in self.stages if stage.name == name)

    @property
    def seconds(self) -> float:
        """Time of the shot itself, without the evaluation that reports on it."""
        return sum(stage.seconds for stage in self.stages if not stage.reports)

    @property
    def peak(self) -> int:
        """Peak bytes over all stages; 0 if no peak was measured."""
        return max((stage.peak for stage in self.stages), default=0)
