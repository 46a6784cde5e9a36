"""Options of the export."""

from __future__ import annotations

from pydantic import Field, field_validator

from llm_surgeon.recipe.formats import FORMATS, explained
from llm_surgeon.recipe.groups.base import Options, check_names


class ExportOptions(Options):
    """Shots that are exported, and the formats of the export."""

    export_shots: tuple[int, ...] = Field(
        (), strict=False, description="Shots to export as well, each into OUT/shot-N; repeat for more."
    )
    formats: tuple[str, ...] = Field(
        ("hf",),
        strict=False,
        min_length=1,
        description=f"Formats of the export: {explained()}; repeat for more.",
    )

    @field_validator("formats")
    @classmethod
    def _check_formats(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(formats, FORMATS)
