"""Records of a comparison of methods."""

from __future__ import annotations

from typing import Any, Literal

from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.records.base import Failure, Record
from llm_surgeon.records.evaluation import Perplexity


class Setting(Record):
    """Setting of a group of cells in a comparison: the structure that is removed, and the sparsity."""

    structure: str
    sparsity: float

    @property
    def label(self) -> str:
        """The setting in words; the name of N:M already says the sparsity."""
        return self.structure if Pattern.parse(self.structure) else f"{self.structure}, {100 * self.sparsity:g} %"


class DenseRecord(Record):
    """The dense model of a comparison; ``texts`` is the digest of the tokens that all cells are given."""

    perplexity: Perplexity
    calibration: dict[str, Any]
    texts: str
    versions: dict[str, str]


class CellMeasures(Record):
    """Measures of one cell of a comparison.

    Attributes:
        perplexity: Perplexity of the pruned model.
        divergence: Mean of KL(dense || pruned) over the scored tokens, in nats.
        sparsity: Share of the dense model's prunable weights that are zero or gone in the pruned one.
        seconds: Time of the shots, without loading and evaluation.
        peak: Peak bytes while pruning: of the device if it is a GPU, else resident in the process.
        calibration: Provenance of the calibration tokens.
        versions: Versions of the packages that the cell ran with.
    """

    perplexity: Perplexity
    divergence: float
    sparsity: float
    seconds: float
    peak: int
    calibration: dict[str, Any]
    versions: dict[str, str]


class Cell(Record):
    """One variant under one setting; a cell whose options the recipe refuses is ``impossible``, and has no recipe."""

    name: str
    variant: str
    setting: Setting
    model: str
    recipe: dict[str, Any] | None = None
    status: Literal["finished", "failed", "impossible"]
    measures: CellMeasures | None = None
    failure: Failure | None = None


class Comparison(Record):
    """A comparison of methods so far. ``comparison.json`` is this record; ``shared`` has the options of all cells."""

    model: str
    shared: dict[str, Any]
    dense: DenseRecord
    cells: tuple[Cell, ...]
    date: str
    command: str | None = None
