"""Presets: recipes by name, with options that go together. Their figures are in docs/global.md."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

Preset = Literal["best", "fast", "none"]

# The method that presets are for, and its default preset.
METHOD: Final = "surgeon"
DEFAULT: Final[Preset] = "best"

_ONE_SHOT: dict[str, Any] = {"shots": 1, "steps_per_shot": 2, "reconstruction": True, "cross_fit": True}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # The best perplexity found without training anything but two gates for each head and group of neurons. More
        # shots, fitted after each or after the last, were no better.
        "best": _ONE_SHOT | {"gate_steps": 4},
        # Without copies of the calibration text and with fewer steps on gates, in half the time.
        "fast": _ONE_SHOT | {"reconstruction_copies": 0, "gate_steps": 2},
        # Each option's own default: the shots of the paper, and no fit.
        "none": {},
    }
)
# Options whose value a preset may have set.
OPTIONS = frozenset(name for options in PRESETS.values() for name in options)
# Options that have no use if the structure leaves zeros in matrices of the old shape, and without reconstruction.
_OF_SHAPES = frozenset({"steps_per_shot", "reconstruction", "reconstruction_copies", "cross_fit"})
_OF_RECONSTRUCTION = frozenset({"reconstruction_copies", "cross_fit"})


def options_of(preset: Any, *, shrinks: bool, divides: bool, reconstructs: bool) -> dict[str, Any]:
    """Options that a preset stands for, without options that have no use in the rest of the recipe.

    Args:
        preset: Name of the preset; a value that is no preset's name has no options.
        shrinks: Whether the structure shrinks matrices.
        divides: Whether the curvature allows steps within a shot.
        reconstructs: Whether reconstruction is wanted, if it is possible.
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
