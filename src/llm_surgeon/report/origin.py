"""Origin of a pruned model: the dense model's own statements on licence, languages and data, for the model card."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

Origin = dict[str, str | list[str]]

# Origin of the model that ``demo`` stands for, from its card on the hub; the directory in the cache has no card.
DEMO: Origin = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "license": "apache-2.0",
    "language": ["en"],
}
KEYS = ("base_model", "license", "license_name", "license_link", "language", "datasets")
# Limits of a card and of its values. Cards have a few kilobytes; a larger one is not read to the end.
_MOST_BYTES = 1_000_000
_LONGEST, _MOST_ENTRIES = 200, 100


def origin_of(model: str, directory: Path | None) -> Origin:
    """Read a dense model's statements from its card; statements that are missing or malformed are left out.

    Args:
        model: Name of the model, as it was given: ``demo``, a directory or a hub id.
        directory: Directory of the model's files; None if they are not on this machine.
    """
    if model == "demo":
        return dict(DEMO)
    if directory is None:
        return {}
    try:
        with (directory / "README.md").open("rb") as file:
            text = file.read(_MOST_BYTES).decode("utf8", "replace")
    except OSError:
        return {}
    known = {key: _plain(value) for key, value in _front_matter(text).items() if key in KEYS}
    return {key: known[key] for key in KEYS if known.get(key)}


def _front_matter(card: str) -> dict[Any, Any]:
    """Values of the YAML between the first two rules of a card; empty if it is missing or cannot be read."""
    found = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", card, re.DOTALL)
    if found is None:
        return {}
    try:
        values = yaml.safe_load(found[1])
    # A date that no calendar has raises a ValueError; endless nesting raises a RecursionError.
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _plain(value: Any) -> str | list[str]:
    """The value, if it is a text or a list of texts of limited length; otherwise an empty one."""
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else ""
    if not isinstance(value, list) or len(value) > _MOST_ENTRIES:
        return []
    return value if all(isinstance(entry, str) and len(entry) <= _LONGEST for entry in value) else []
