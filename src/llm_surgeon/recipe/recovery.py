"""Recipe of a recovery: the text that a pruned model is trained on, from which teacher, and for how long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.groups.base import FEW, MANY, MOST_SEED, Quantity, TextSources
from llm_surgeon.recipe.groups.calibration import PASS_TOKENS, Bos
from llm_surgeon.recipe.groups.evaluation import EvaluationOptions
from llm_surgeon.recipe.groups.recovery import BATCH_SIZE, LEARNING_RATE
from llm_surgeon.recipe.groups.resources import Dtype, Precision
from llm_surgeon.recipe.sources import Source, sources_of
from llm_surgeon.recipe.wording import refusal

# Options that have an effect with a teacher only.
OF_TEACHERS = ("temperature", "top_k", "label_weight")


class RecoverConfig(EvaluationOptions):
    """Everything that decides the result of a recovery beside the two models."""

    data: TextSources = Field(
        ("demo",),
        description="Text to train on: a hub data set id, a .txt/.jsonl/.parquet of texts or chats, or "
        "demo[:en|fr|es]; or several, each as TEXT:SHARE. The last tenth of each is held out unless "
        "evaluation names other texts.",
    )
    tokens: Quantity = Field(1_000_000, description="Tokens to train on, such as 2M.")
    seq_len: int = Field(512, ge=2, le=MANY, description="Tokens per sequence.")
    batch_size: int = Field(
        BATCH_SIZE, ge=1, le=FEW, description="Sequences of an optimizer step, of all processes together."
    )
    pass_size: int | None = Field(
        None,
        ge=1,
        le=FEW,
        description=f"Sequences of a pass; fewer need less memory (unset: {PASS_TOKENS:,} tokens).",
    )
    learning_rate: float = Field(
        LEARNING_RATE, gt=0.0, lt=1.0, description="Highest learning rate of AdamW; falls to a tenth on a cosine."
    )
    warmup: float = Field(0.05, ge=0.0, lt=1.0, description="Share of the steps over which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0.0, lt=1.0, description="Weight decay of AdamW.")
    clip: float = Field(1.0, gt=0.0, description="Largest norm of a step's gradient; a longer one is shortened to it.")
    temperature: float = Field(1.0, gt=0.0, le=100.0, description="Temperature of both models' predictions.")
    top_k: int = Field(
        128,
        ge=0,
        le=MANY,
        description="The teacher's likeliest tokens to learn from, the others together as one (0: all apart).",
    )
    label_weight: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="Share of the text's own next tokens in the loss; the rest is the divergence from the teacher.",
    )
    adapters: int | None = Field(
        None, ge=1, le=FEW, description="Rank of adapters to train in place of all weights; absorbed at the end (peft)."
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations of a block again in the backward pass: less memory, one more pass."
    )
    evaluations: int = Field(10, ge=1, le=FEW, description="Times that held-out perplexity is measured on the way.")
    patience: int | None = Field(
        None, ge=1, le=FEW, description="Evaluations without a better perplexity after which the training stops early."
    )
    bos: Bos = Field(
        "auto", description="Whether sequences begin with the token that begins a text: auto, always or never."
    )
    seed: int = Field(0, ge=0, le=MOST_SEED, description="Seed of the order of the text, and of adapters.")
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda or cuda:N.")
    dtype: Dtype = Field(
        "auto", description="Type of the teacher's weights: auto (as stored), float32, bfloat16 or float16."
    )
    precision: Precision = Field(
        "bfloat16", description="Arithmetic of the passes: bfloat16 or float32; trained weights are float32."
    )
    trust_remote_code: bool = Field(False, description="Run code that a checkpoint brings, if it is no export of ours.")

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.patience is not None and not self.evaluates:
            raise ValueError("patience waits for a better perplexity: evaluation cannot be none")
        if self.tokens < self.batch_size * self.seq_len:
            raise ValueError(
                f"{self.tokens:,} tokens are fewer than one step of {self.batch_size} sequences (batch_size) of "
                f"{self.seq_len:,} tokens (seq_len)"
            )
        return self

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        return self.tokens // (self.batch_size * self.seq_len)

    @property
    def sequences_per_pass(self) -> int:
        """Number of sequences of a forward and backward pass, at most."""
        return self.pass_size or max(1, min(self.batch_size, PASS_TOKENS // self.seq_len))

    @property
    def sources(self) -> tuple[Source, ...]:
        """Texts to train on, with their shares."""
        return sources_of(self.data)

    @classmethod
    def of_run(cls, config: PruneConfig) -> RecoverConfig:
        """Recipe of the training at the end of a pruning run, on the run's texts and in its arithmetic."""
        shared = ("evaluation", "eval_window", "eval_tokens", "seq_len", "bos", "seed", "device", "dtype", "precision")
        return cls.from_mapping(
            {name: getattr(config, name) for name in (*shared, "trust_remote_code")}
            | {
                "data": config.calibration,
                "tokens": config.recover_tokens,
                "batch_size": config.recover_batch_size,
                "learning_rate": config.recover_learning_rate,
            }
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> RecoverConfig:
        """Validate a mapping of options.

        Raises:
            ConfigError: If a key is unknown or a value is out of range, with each of them.
        """
        try:
            return cls.model_validate({name: value for name, value in values.items() if value is not None})
        except ValidationError as error:
            raise refusal(error.errors(include_url=False), cls.model_fields, "recover --help") from None
