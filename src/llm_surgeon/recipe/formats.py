"""The table of formats that a pruned model can be exported in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FormatRow:
    """One row of the table of formats.

    Attributes:
        summary: Description of the format, in a few words.
    """

    summary: str


FORMATS: dict[str, FormatRow] = {
    "hf": FormatRow("a directory that transformers loads"),
    "nemotron-nas": FormatRow("a directory for vLLM's own class, whose blocks differ in the number of neurons"),
}
