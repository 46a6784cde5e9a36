"""N:M patterns: N weights kept of every M consecutive inputs of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """A pattern N:M, which keeps ``kept`` weights of every ``group`` consecutive inputs of a row: 2 of 4 for 2:4."""

    kept: int
    group: int

    @property
    def removed(self) -> int:
        """Number of weights that a whole group loses."""
        return self.group - self.kept

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed once every group has lost its share."""
        return self.removed / self.group

    @classmethod
    def parse(cls, text: object) -> Pattern | None:
        """Parse ``N:M`` with 0 < N < M; None if the text is something else."""
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text) if isinstance(text, str) else None
        if found is None or not 0 < int(found[1]) < int(found[2]):
            return None
        return cls(int(found[1]), int(found[2]))
