"""Recipes by name: options that go together. Their figures are in docs/global.md."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

Preset = Literal["fast", "best"]

_ONE_SHOT: dict[str, Any] = {"shots": 1, "steps_per_shot": 2, "reconstruction": True, "cross_fit": True}
PRESETS = MappingProxyType(
    {
        # Copies of the calibration text and more steps on gates take twice the time.
        "fast": _ONE_SHOT | {"reconstruction_copies": 0, "gate_steps": 2},
        # The best perplexity found without training, but for two numbers for each head and group of neurons. More
        # shots, fitted after each or after the last, were no better.
        "best": _ONE_SHOT | {"gate_steps": 4},
    }
)
# What structures that leave zeros in matrices of the old shapes have no use for, and recipes without reconstruction.
_OF_SHAPES = ("steps_per_shot", "reconstruction", "reconstruction_copies", "cross_fit")
_OF_RECONSTRUCTION = ("reconstruction_copies", "cross_fit")


def options_of(preset: Any, *, shrinks: bool, reconstructs: bool) -> dict[str, Any]:
    """The options that a preset stands for, none for a name that there is not.

    Args:
        preset: Its name.
        shrinks: Whether the structure shrinks matrices.
        reconstructs: Whether reconstruction is wanted, if it can be.
    """
    options = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    useless: tuple[str, ...] = ()
    if not shrinks:
        useless = _OF_SHAPES
    elif not reconstructs:
        useless = _OF_RECONSTRUCTION
    return {name: value for name, value in options.items() if name not in useless}
