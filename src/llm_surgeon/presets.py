"""Recipes by name: options that go together. Their figures are in docs/global.md."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal

Preset = Literal["fast", "best"]

PRESETS = MappingProxyType(
    {
        # One curvature pass. Copies of the calibration text take twice the time for another 2 % of perplexity.
        "fast": {"shots": 1, "steps_per_shot": 2, "reconstruction": True, "reconstruction_copies": 0},
        # The best perplexity found without training, but for two numbers for each head and feed-forward part.
        "best": {"shots": 5, "reconstruction": True, "gate_steps": 2},
    }
)
# What structures that leave zeros in matrices of the old shapes have no use for.
_OF_SHAPES = ("steps_per_shot", "reconstruction", "reconstruction_copies")


def options_of(preset: Any, *, shrinks: bool) -> dict[str, Any]:
    """The options that a preset stands for, none for a name that there is not.

    Args:
        preset: Its name.
        shrinks: Whether the structure shrinks matrices.
    """
    options = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    return {name: value for name, value in options.items() if shrinks or name not in _OF_SHAPES}
