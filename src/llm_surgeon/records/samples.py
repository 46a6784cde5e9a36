"""Records of texts that models write, and of several models on the same texts."""

from __future__ import annotations

from llm_surgeon.records.base import Record
from llm_surgeon.records.evaluation import Perplexity


class Continuation(Record):
    """What one model writes for a prompt: with the likeliest token each time, and with drawn tokens."""

    prompt: str
    greedy: str
    sampled: str


class Samples(Record):
    """What one model writes for prompts; ``chat`` says whether they were messages in the tokenizer's template."""

    model: str
    chat: bool
    continuations: tuple[Continuation, ...]


class SampleComparison(Record):
    """What models write for the same prompts, and how tokens were drawn; the first model is the reference, if several.

    ``tokens`` is the largest number of new tokens; ``temperature`` and ``top_p`` are of the drawn texts.
    """

    models: tuple[Samples, ...]
    tokens: int
    temperature: float
    top_p: float
    seed: int
    versions: dict[str, str]


class ExportMeasures(Record):
    """Size and quality of one model.

    ``weight_bytes`` are of its files; None if they are not on this machine. ``divergences`` are from the first model,
    in nats per token, one for each text; None where the vocabularies differ, or for the first model itself.
    """

    model: str
    parameters: int
    weight_bytes: int | None
    perplexities: tuple[Perplexity, ...]
    divergences: tuple[float | None, ...]


class ExportComparison(Record):
    """Several models on the same tokens of the same texts."""

    models: tuple[ExportMeasures, ...]
    command: str | None
    versions: dict[str, str]
