"""Records of a comparison of methods."""

from __future__ import annotations

from typing import Any, Literal

from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.records.base import Failure, Record
from llm_surgeon.records.evaluation import Perplexity


class Setting(Record):
    """What all cells of a group of a comparison remove: single weights or rows and columns, and how much of them."""

    structure: str
    sparsity: float

    @property
    def label(self) -> str:
        """The setting in words; the sparsity of N:M is in its name."""
        return self.structure if Pattern.parse(self.structure) else f"{self.structure}, {100 * self.sparsity:g} %"


class DenseRecord(Record):
    """The dense model of a comparison; ``texts`` is the digest of the tokens that all cells are given."""

    perplexity: Perplexity
    calibration: dict[str, Any]
    texts: str
    versions: dict[str, str]


class CellMeasures(Record):
    """What one cell of a comparison measured.

    Attributes:
        perplexity: Of the pruned model.
        divergence: Mean of KL(dense || pruned) over the scored tokens, in nats.
        sparsity: Share of the dense model's prunable weights that are zero or gone in the pruned one.
        seconds: Time of the shots, without loading and evaluation.
        peak: Peak bytes while pruning: of the device if it is a GPU, else resident in the process.
        calibration: Where the calibration tokens come from.
        versions: Of what it ran on.
    """

    perplexity: Perplexity
    divergence: float
    sparsity: float
    seconds: float
    peak: int
    calibration: dict[str, Any]
    versions: dict[str, str]


class Cell(Record):
    """One variant under one setting; ``impossible`` is what the recipe refuses, and has none."""

    name: str
    variant: str
    setting: Setting
    model: str
    recipe: dict[str, Any] | None = None
    status: Literal["finished", "failed", "impossible"]
    measures: CellMeasures | None = None
    failure: Failure | None = None


class Comparison(Record):
    """A comparison of methods so far. ``comparison.json`` is this record; ``shared`` are the options of all cells."""

    model: str
    shared: dict[str, Any]
    dense: DenseRecord
    cells: tuple[Cell, ...]
    date: str
    command: str | None = None
