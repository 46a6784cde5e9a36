"""The base of all records."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of the records: frozen and serialisable; infinities, which JSON has no number for, become strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Failure(Record):
    """Cause of a missing result, with a remedy; an unforeseen error has its stack trace, and no remedy."""

    cause: str
    remedy: str
    trace: str | None = None
