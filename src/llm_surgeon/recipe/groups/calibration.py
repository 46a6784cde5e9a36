"""Options of the calibration text."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llm_surgeon.recipe.groups.base import MANY, MOST_SEED, Options, TextSources

Bos = Literal["auto", "always", "never"]

# Number of tokens of a pass. Fewer do not keep matrix units busy, and more need more memory: on 2 cores, passes over
# 1,024, 2,048 and 4,096 tokens take 1.14, 1 and 0.95 times as long.
PASS_TOKENS = 2048


class CalibrationOptions(Options):
    """The text for curvature and stages, and the form in which a run reads it."""

    calibration: TextSources = Field(
        ("demo",),
        description="A hub data set id, a local .txt/.jsonl/.parquet of texts or chats, or demo[:en|fr|es]; or "
        "several, each as TEXT:SHARE.",
    )
    samples: int = Field(128, ge=1, le=MANY, description="Calibration sequences.")
    seq_len: int = Field(512, ge=2, le=MANY, description="Tokens per calibration sequence.")
    windows_per_sample: int = Field(
        1,
        ge=1,
        le=MANY,
        description="Windows of the text, each from another place, that make up a calibration sequence one behind the "
        "other: as many places as with short sequences, and as much context as in long ones.",
    )
    bos: Bos = Field(
        "auto",
        description="Whether each window, of calibration and of evaluation, begins with the token that begins a text: "
        "auto (where the tokenizer puts one before a text), always or never (windows as they are cut, which published "
        "figures of Llama and OPT are of).",
    )
    batch_size: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description=f"Calibration sequences per pass; fewer need less memory (unset: {PASS_TOKENS:,} tokens).",
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="Seed of every random choice.")

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        if self.seq_len % self.windows_per_sample:
            raise ValueError(
                f"a sequence of {self.seq_len} tokens (seq_len) cannot be {self.windows_per_sample} windows "
                "(windows_per_sample) of equal length"
            )
        return self

    @property
    def sequences_per_pass(self) -> int:
        """Number of calibration sequences of a pass."""
        return self.batch_size or max(1, min(self.samples, PASS_TOKENS // self.seq_len))
