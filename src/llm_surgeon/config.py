"""The recipe: one validated, frozen, serialisable description of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from llm_surgeon.errors import ConfigError

Structure = Literal["rows-columns"]
RankBy = Literal["cost-per-weight", "cost"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Precision = Literal["bfloat16", "float32"]


class PruneConfig(BaseModel):
    """Everything that decides the result of a pruning run.

    ``sparsity`` counts the weights of the prunable linear layers only (those of the decoder blocks, without
    biases); embeddings and the output head are left alone, see ``ignore``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sparsity: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="Fraction of the prunable linear weights to remove; embeddings and lm_head are excluded.",
    )
    structure: Structure = Field("rows-columns", description="What is removed as a unit.")
    shots: int = Field(5, ge=1, description="Shots on a linear schedule; curvature is estimated afresh in each.")
    rank_by: RankBy = Field(
        "cost-per-weight", description="Rank structures by cost-per-weight freed, or by cost, the paper's raw one."
    )
    calibration: str = Field(
        "demo", min_length=1, description="A hub data set id, a local .txt/.jsonl/.parquet, or demo[:en|fr|es]."
    )
    samples: int = Field(128, ge=1, description="Calibration sequences.")
    seq_len: int = Field(512, ge=2, description="Tokens per calibration sequence.")
    batch_size: int = Field(2, ge=1, description="Calibration sequences per pass; fewer need less memory.")
    dampening_a: float = Field(
        0.01, gt=0.0, description="Damping of the input factor A, as a fraction of its mean diagonal."
    )
    dampening_g: float = Field(
        0.1, gt=0.0, description="Damping of the gradient factor G, as a fraction of its mean diagonal."
    )
    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda or cuda:N.")
    dtype: Dtype = Field("auto", description="Type of the weights: auto (as stored), float32, bfloat16 or float16.")
    precision: Precision = Field(
        "bfloat16", description="Arithmetic of the passes: bfloat16 or float32; sums are float32 in any case."
    )
    evaluation: str | None = Field(
        None, description="Text to measure perplexity on; unset: held-out text of the calibration source, none: skip."
    )
    eval_window: int = Field(1024, ge=2, description="Tokens per evaluation window.")
    eval_stride: int | None = Field(None, ge=1, description="Tokens between windows; unset: the window.")
    eval_tokens: int = Field(20_480, ge=2, description="Evaluation tokens, at most.")
    ignore: tuple[str, ...] = Field(
        ("lm_head",), description="Layers never pruned: a regular expression on the end of the name; repeat for more."
    )

    @field_validator("ignore")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return patterns

    @property
    def sparsity_schedule(self) -> list[float]:
        """Sparsity after each shot, linear from dense to the target (paper, Alg. 2)."""
        return [self.sparsity * shot / self.shots for shot in range(1, self.shots + 1)]

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; ``from_mapping`` of it gives the same configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> PruneConfig:
        """Validate a mapping of options.

        Raises:
            ConfigError: If a key is unknown or a value is out of range; names each of them.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(part) for part in issue['loc']) or 'recipe'}: {issue['msg']} (got {issue['input']!r})"
                for issue in error.errors()
            )
            raise ConfigError(
                f"The recipe is not valid: {problems}.",
                f"Known options are {', '.join(cls.model_fields)}; `llm-surgeon prune --help` explains each.",
            ) from None


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe as a mapping of options with underscores; hyphens in keys are accepted.

    Raises:
        ConfigError: If the file cannot be read or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The recipe {path} cannot be read: {error}.", "Give a YAML file of option: value.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"The recipe {path} is not a mapping.", "Write one `option: value` per line.")
    return {str(key).replace("-", "_"): value for key, value in values.items()}
