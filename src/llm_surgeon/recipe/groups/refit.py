"""Options of the stages that fit the weights left by a shot, without training: reconstruction, gates, further ones."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from llm_surgeon.recipe.groups.base import FEW, MANY, Options, check_names
from llm_surgeon.recipe.stages import STAGES_KNOWN

# Number of parts into which cross-fitting divides the calibration sequences.
HALVES = 2


class RefitOptions(Options):
    """Stages after each shot that fit the weights that are left."""

    reconstruction: bool = Field(
        False,
        description="After each shot, correct what writes into the residual stream by least squares, towards the "
        "stream of the dense model, which is kept, and scale the last norm by the loss; no training. For structures "
        "that shrink.",
    )
    reconstruction_ridge: float = Field(
        0.2, gt=0.0, description="Ridge that holds its weights where they are, as a fraction of the mean squared input."
    )
    reconstruction_copies: int = Field(
        2,
        ge=0,
        le=FEW,
        description="Copies of the calibration sequences that it is fitted to as well, in which the dense model has "
        "written some of the tokens.",
    )
    reconstruction_share: float = Field(0.5, gt=0.0, le=1.0, description="Share of the tokens of a copy that it has.")
    gate_steps: int = Field(
        0,
        ge=0,
        le=FEW,
        description="After each shot, Newton steps on gates: one number for the output and the queries of each head, "
        "and for the output and the switch of each group of neurons, by the loss of the calibration text; 0: none. "
        "No other weight is trained.",
    )
    gate_width: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="Neurons of a feed-forward part that share gates; unset: all of it, and with cross_fit as few "
        "(16 or more) as leave each gate a token to be set by, with 8,192 gates at most.",
    )
    gate_damping: float | None = Field(
        None,
        gt=0.0,
        description="Damping of these steps, as a fraction of the mean diagonal of the gates' Fisher; unset: the one "
        "with the largest evidence.",
    )
    cross_fit: bool = Field(
        False,
        description="Reconstruct from each half of the calibration sequences by itself, with gates set by the other "
        "half, and take the mean of the two models' weights.",
    )
    stages: tuple[str, ...] = Field(
        (), strict=False, description="Further stages after each shot, by name, in order; repeat for more."
    )

    @field_validator("stages")
    @classmethod
    def _check_stages(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        return check_names(stages, STAGES_KNOWN)

    @model_validator(mode="after")
    def _check_cross_fit(self) -> Self:
        if self.cross_fit and not self.reconstruction:
            raise ValueError("cross_fit is for reconstruction: set it, or leave cross_fit out")
        return self

    @property
    def parts_of_text(self) -> int:
        """Number of parts of the text that have a fit of their own; each process needs a sequence of each part."""
        return HALVES if self.cross_fit else 1
