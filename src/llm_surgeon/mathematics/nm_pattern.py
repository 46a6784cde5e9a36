"""N:M patterns."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """``kept`` weights are kept of every ``group`` consecutive inputs of a row: 2 of 4 for 2:4."""

    kept: int
    group: int

    @property
    def removed(self) -> int:
        """Weights that a whole group loses."""
        return self.group - self.kept

    @property
    def sparsity(self) -> float:
        """Fraction removed once every group has lost its share."""
        return self.removed / self.group

    @classmethod
    def parse(cls, text: object) -> Pattern | None:
        """``N:M`` with 0 < N < M as a pattern; None if the text is something else."""
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text) if isinstance(text, str) else None
        if found is None or not 0 < int(found[1]) < int(found[2]):
            return None
        return cls(int(found[1]), int(found[2]))
