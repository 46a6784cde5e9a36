"""The recipe: one validated, frozen, serialisable description of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from llm_surgeon.errors import ConfigError
from llm_surgeon.methods import METHODS, CurvatureName, MethodName, resolve_curvature
from llm_surgeon.pattern import Pattern

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
        description="Fraction of the prunable linear weights to remove; embeddings and lm_head are excluded. "
        "For N:M unless given: what removing M-N of every M weights makes.",
    )
    structure: str = Field(
        "rows-columns",
        description="What is removed as a unit: rows-columns (really smaller), unstructured (single weights become "
        "zero) or N:M, which keeps N of every M consecutive inputs, e.g. 2:4.",
    )
    method: MethodName = Field("surgeon", description=f"One of {', '.join(METHODS)}.")
    curvature: CurvatureName | None = Field(
        None,
        description="Approximation of the Fisher, unset: the method's own. kfac, nearest-kronecker, kronecker-sum (two "
        "products), diagonal, activations or identity.",
    )
    fisher: Literal["empirical", "true"] = Field(
        "empirical", description="Labels of the gradients: empirical (the text's own) or true (sampled from the model)."
    )
    fisher_samples: int = Field(1, ge=1, description="Sampled labels per token with --fisher true.")
    kronecker_iterations: int = Field(
        2, ge=1, description="Power iterations of nearest-kronecker and kronecker-sum; two passes over the data each."
    )
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
    max_correlations: int = Field(
        0,
        ge=0,
        description="Removed structures (or weights) whose update is computed together, at most; 0: all, 1: each as if "
        "the others stayed.",
    )
    update_steps: int = Field(
        20, ge=1, description="Conjugate-gradient steps of the update of unstructured and N:M pruning, at most."
    )
    seed: int = Field(0, ge=0, description="Seed of every random choice.")
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda or cuda:N.")
    dtype: Dtype = Field("auto", description="Type of the weights: auto (as stored), float32, bfloat16 or float16.")
    precision: Precision = Field(
        "bfloat16", description="Arithmetic of the passes: bfloat16 or float32; sums are float32 in any case."
    )
    lora: bool = Field(False, description="First-order corrections: train low-rank adapters after each shot (peft).")
    lora_rank: int = Field(16, ge=1, description="Rank of the corrections of one shot.")
    lora_learning_rate: float = Field(5e-4, gt=0.0, description="Learning rate of the corrections.")
    lora_steps: int = Field(32, ge=1, description="Optimizer steps of the corrections after a shot, a batch each.")
    lora_final_steps: int = Field(64, ge=1, description="Steps after the last shot.")
    lora_share: float = Field(
        1.0, gt=0.0, le=1.0, description="Share of the calibration sequences that the corrections of a shot use."
    )
    export_shots: tuple[int, ...] = Field(
        (), description="Shots to export as well, each into OUT/shot-N; repeat for more."
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

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, values: Any) -> Any:
        pattern = Pattern.parse(values.get("structure")) if isinstance(values, dict) else None
        if pattern is not None and values.get("sparsity") is None:
            return values | {"sparsity": pattern.sparsity}
        return values

    @field_validator("structure")
    @classmethod
    def _check_structure(cls, structure: str) -> str:
        if structure not in ("rows-columns", "unstructured") and Pattern.parse(structure) is None:
            raise ValueError("valid are rows-columns, unstructured, and N:M with 0 < N < M, such as 2:4 or 4:8")
        return structure

    @model_validator(mode="after")
    def _check_together(self) -> PruneConfig:
        curvature = resolve_curvature(self.method, self.curvature)
        if self.pattern is not None and self.sparsity > self.pattern.sparsity + 1e-12:
            raise ValueError(
                f"a sparsity of {self.sparsity:g} is more than {self.structure} can reach, which is "
                f"{self.pattern.sparsity:g}"
            )
        if any(not 1 <= shot <= self.shots for shot in self.export_shots):
            raise ValueError(f"export_shots {self.export_shots} are not all between 1 and {self.shots}, the shots")
        if curvature == "kronecker-sum" and self.max_correlations:
            raise ValueError("the kronecker-sum curvature updates all together: max_correlations has to be 0")
        return self

    @property
    def pattern(self) -> Pattern | None:
        """The N:M pattern, if the structure is one."""
        return Pattern.parse(self.structure)

    @property
    def resolved_curvature(self) -> CurvatureName:
        """The curvature of the run: the one named, or the method's own."""
        return resolve_curvature(self.method, self.curvature)

    @property
    def correlated(self) -> bool:
        """Whether the method's costs and updates know of correlations."""
        return METHODS[self.method].correlated

    @property
    def sparsity_schedule(self) -> list[float]:
        """Sparsity after each shot, linear from dense to the target (paper, Alg. 2)."""
        return [self.sparsity * shot / self.shots for shot in range(1, self.shots + 1)]

    def resolved(self) -> dict[str, Any]:
        """Every option with the value that it has in the run; ``from_mapping`` of it gives the same run."""
        return self.model_dump(mode="json") | {"curvature": self.resolved_curvature}

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> PruneConfig:
        """Validate a mapping of options.

        Raises:
            ConfigError: If a key is unknown or a value is out of range; names each of them.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(_problem(issue) for issue in error.errors())
            unknown = any(issue["type"] == "extra_forbidden" for issue in error.errors())
            known = f"Known options are {', '.join(cls.model_fields)}. " if unknown else ""
            raise ConfigError(
                f"The recipe is not valid: {problems}.", f"{known}`llm-surgeon prune --help` explains each option."
            ) from None


def _problem(issue: Mapping[str, Any]) -> str:
    """One finding of the validation, with the offending value if it concerns a single option."""
    message = issue["msg"].removeprefix("Value error, ")
    # The input of what is wrong with several options together would be the whole recipe.
    return (
        f"{'.'.join(str(part) for part in issue['loc'])}: {message} (got {issue['input']!r})"
        if issue["loc"]
        else message
    )


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
    return with_underscores(values)


def with_underscores(options: Mapping[Any, Any]) -> dict[str, Any]:
    """Options as the recipe spells them, whatever the command line does."""
    return {str(key).replace("-", "_"): value for key, value in options.items()}
