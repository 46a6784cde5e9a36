"""The table of further stages after a shot, which a recipe names in ``stages``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageRow:
    """One row of the table of further stages.

    Attributes:
        summary: Purpose of the stage, in a few words.
    """

    summary: str


# Extensions add rows of their own. The package's stages have no rows but options (reconstruction, gates, lora).
STAGES_KNOWN: dict[str, StageRow] = {}
