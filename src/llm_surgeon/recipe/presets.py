"""Recipes by name: options that go together. Their figures are in docs/global.md."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

Preset = Literal["best", "fast", "none"]

# The method that presets are for, and the one that it has unless another is given.
METHOD: Final = "surgeon"
DEFAULT: Final[Preset] = "best"

_ONE_SHOT: dict[str, Any] = {"shots": 1, "steps_per_shot": 2, "reconstruction": True, "cross_fit": True}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The best perplexity found without training, but for two numbers for each head and group of neurons. More
        # shots, fitted after each or after the last, were no better.
        "best": _ONE_SHOT | {"gate_steps": 4},
        # Without copies of the calibration text and with fewer steps on gates, in half the time.
        "fast": _ONE_SHOT | {"reconstruction_copies": 0, "gate_steps": 2},
        # Each option's own default: the paper's shots, and nothing fitted.
        "none": {},
    }
)
# Options whose value a preset may have set.
OPTIONS = frozenset(name for options in PRESETS.values() for name in options)
# What structures that leave zeros in matrices of the old shapes have no use for, and recipes without reconstruction.
_OF_SHAPES = frozenset({"steps_per_shot", "reconstruction", "reconstruction_copies", "cross_fit"})
_OF_RECONSTRUCTION = frozenset({"reconstruction_copies", "cross_fit"})


def options_of(preset: Any, *, shrinks: bool, divides: bool, reconstructs: bool) -> dict[str, Any]:
    """The options that a preset stands for, less those that the rest of the recipe has no use for.

    Args:
        preset: Its name; what is no name of one has no options.
        shrinks: Whether the structure shrinks matrices.
        divides: Whether the curvature can be divided into steps.
        reconstructs: Whether reconstruction is wanted, if it can be.
    """
    options = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    useless: set[str] = set()
    if not shrinks:
        useless |= _OF_SHAPES
    if not divides:
        useless.add("steps_per_shot")
    if not reconstructs:
        useless |= _OF_RECONSTRUCTION
    return {name: value for name, value in options.items() if name not in useless}
