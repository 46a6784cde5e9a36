"""The base of all records."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of the records: frozen and serialisable; what JSON has no number for (infinity) is a string there."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Failure(Record):
    """Why there is no result, and what can be done about it; the stack trace, and no remedy, if it was not foreseen."""

    cause: str
    remedy: str
    trace: str | None = None
