"""Options of the removal: its size, its units, its method and its shots."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.recipe import structures
from llm_surgeon.recipe.groups.base import FEW, Options, Quantity
from llm_surgeon.recipe.methods import LAYERWISE, METHODS, method_names
from llm_surgeon.recipe.presets import DEFAULT, METHOD, Preset
from llm_surgeon.recipe.quantised import QUANTISED, parse_multiple, quantised_type
from llm_surgeon.recipe.quantity import shown
from llm_surgeon.recipe.structures import STRUCTURES, UNSTRUCTURED

RankBy = Literal["cost-per-weight", "cost"]
RoundTo = Annotated[int | str, BeforeValidator(parse_multiple)]

# Options that may be given instead of the sparsity.
TARGETS = ("target_params", "target_bytes", "target_latency")


class SelectionOptions(Options):
    """Size, units and method of the removal, and its shots and steps."""

    sparsity: float = Field(
        0.5,
        gt=0.0,
        lt=1.0,
        description="Fraction of the prunable linear weights to remove; embeddings and lm_head are excluded. "
        "For N:M unless given: what removing M-N of every M weights makes.",
    )
    target_params: Quantity | None = Field(
        None, description="Instead of sparsity: parameters of the result, all of them, e.g. 90M."
    )
    target_bytes: Quantity | None = Field(
        None, description="Instead of sparsity: bytes of its weight files, e.g. 300MiB."
    )
    target_latency: float | None = Field(
        None,
        gt=0.0,
        description="Instead of sparsity: milliseconds of a pass over 512 tokens on this device, measured before on "
        "copies of the model with random removals, and afterwards on the result.",
    )
    structure: str = Field(
        structures.DEFAULT,
        description=f"What is removed as a unit. Really smaller: {structures.explained()}, or several joined by +, "
        "e.g. neurons+heads. Zeros in the old shapes: unstructured (single weights), or N:M, which keeps N of every M "
        "consecutive inputs, e.g. 2:4.",
    )
    preset: Preset = Field(
        DEFAULT,
        description="Options that go together, each of which holds if it is given as well: best (one shot, its model "
        "fitted to the calibration text, nothing trained but gates), fast (the same in half the time) or none (five "
        "shots, nothing fitted). For the method surgeon; the others have none.",
    )
    method: str = Field(
        METHOD,
        description=f"Global: {', '.join(METHODS)}. Layer-wise: {', '.join(LAYERWISE)}; these are for unstructured "
        "(their default) and N:M.",
    )
    shots: int = Field(
        5,
        ge=1,
        le=FEW,
        description="Shots on a linear schedule; curvature is estimated afresh in each. 1 if layer-wise.",
    )
    steps_per_shot: int = Field(
        1,
        ge=1,
        le=FEW,
        description="Steps in which a shot removes what it has to; in each, costs are computed anew from the shot's "
        "curvature, for what the steps before have left. For structures that shrink.",
    )
    uniform: bool = Field(
        False,
        description="For neurons, heads, experts (their default) or blocks: the same widths in every block, so that "
        "plain transformers classes load the export; blocks then go whole.",
    )
    round_to: RoundTo | None = Field(
        None,
        description="For neurons: what is left in each block is a multiple of this (unset: 32 with neurons, else 1). "
        f"Or a type of quantised weights ({', '.join(QUANTISED)}): neurons, and dimensions of all heads, as it needs.",
    )
    min_width: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="Share of its neurons, heads and value dimensions that each block keeps at least (unset: 0.05 for "
        "structures made of neurons, heads and values, else 0, which lets layers be emptied).",
    )
    rank_by: RankBy = Field(
        "cost-per-weight", description="Rank structures by cost-per-weight freed, or by cost, the paper's raw one."
    )
    ignore: tuple[str, ...] = Field(
        ("lm_head",),
        strict=False,
        description="Layers never pruned: a regular expression on the end of the name; repeat for more.",
    )

    @field_validator("ignore")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"has {shown(pattern)}, which is no regular expression: {error}") from None
        return patterns

    @field_validator("method")
    @classmethod
    def _check_method(cls, method: str) -> str:
        if method not in method_names():
            raise ValueError(f"is not known: valid are {', '.join(method_names())}")
        return method

    @field_validator("structure")
    @classmethod
    def _check_structure(cls, structure: str) -> str:
        parts = structure.split("+")
        shrinks = set(parts) <= set(STRUCTURES) and len(set(parts)) == len(parts)
        if not shrinks and structure != UNSTRUCTURED and Pattern.parse(structure) is None:
            raise ValueError(
                f"is not known: valid are {', '.join(STRUCTURES)}, several of these joined by +, unstructured, and N:M "
                "with 0 < N < M, such as 2:4 or 4:8"
            )
        return structure

    @model_validator(mode="after")
    def _check_sparsity(self) -> Self:
        if self.pattern is not None and self.sparsity > self.pattern.sparsity + 1e-12:
            raise ValueError(
                f"a sparsity of {self.sparsity:g} is more than {self.structure} can reach, which is "
                f"{self.pattern.sparsity:g}"
            )
        if self.target is not None and not self.parts:
            raise ValueError(f"{self.target} is for structures that shrink, not for {self.structure}: give sparsity")
        if self.preset != "none" and self.method != METHOD:
            raise ValueError(f"preset is for the method {METHOD}, not for {self.method}")
        return self

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        rows = [STRUCTURES[part] for part in self.parts]
        if self.uniform and not (rows and all(row.uniform for row in rows)):
            *others, last = structures.uniform_structures()
            raise ValueError(f"uniform is for {', '.join(others)} and {last}, not for {self.structure}")
        if self.uniform and len(rows) > 1 and any(row.whole for row in rows):
            whole = next(part for part in self.parts if STRUCTURES[part].whole)
            *others, last = [name for name in structures.uniform_structures() if not STRUCTURES[name].whole]
            raise ValueError(
                f"uniform {whole} go whole: {', '.join(others)} and {last} cannot be removed in the same run"
            )
        if isinstance(self.round_to, str):
            if not rows or not set(self.parts) <= {"neurons", "heads"}:
                raise ValueError(f"round_to {self.round_to} is for neurons and heads, not for {self.structure}")
        elif self.round_to not in (None, 1) and structures.multiple_of(self.parts) is None:
            raise ValueError("round_to is for structures with neurons and without rows-columns")
        if self.min_width is not None and not rows:
            raise ValueError(f"min_width is for structures that shrink, not for {self.structure}")
        return self

    @property
    def pattern(self) -> Pattern | None:
        """The N:M pattern; None if the structure is no N:M."""
        return Pattern.parse(self.structure)

    @property
    def target(self) -> str | None:
        """Name of the target that is given instead of the sparsity; None without a target."""
        return next((name for name in TARGETS if getattr(self, name) is not None), None)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the structures whose removal shrinks the matrices; none for single weights and N:M."""
        return structures.parts_of(self.structure)

    @property
    def widths_multiple(self) -> int:
        """Multiple that the number of neurons left in each block has to be."""
        if isinstance(self.round_to, str):
            return self.block_of_quantised
        return self.round_to or structures.multiple_of(self.parts) or 1

    @property
    def rounding(self) -> int | str:
        """Multiple of the number of neurons, or name of the quantised type that says it."""
        return self.round_to if isinstance(self.round_to, str) else self.widths_multiple

    @property
    def block_of_quantised(self) -> int:
        """Columns of a block of the quantised type in ``round_to``; 1 if it names none."""
        name = quantised_type(self.round_to) if isinstance(self.round_to, str) else None
        return QUANTISED[name].block if name else 1

    @property
    def least_width(self) -> float:
        """Least share of its neurons, heads and value dimensions that each block keeps."""
        return structures.min_width_of(self.parts) if self.min_width is None else self.min_width

    @property
    def correlated(self) -> bool:
        """Whether a global method's costs and updates know of correlations."""
        return METHODS[self.method].correlated

    @property
    def sparsity_schedule(self) -> list[float]:
        """Sparsity after each shot, linear from dense to the target (paper, Alg. 2)."""
        return [self.sparsity * shot / self.shots for shot in range(1, self.shots + 1)]
