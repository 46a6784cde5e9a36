"""The two forms of a recipe: flat, with one option per line, and in groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.file import with_underscores
from llm_surgeon.recipe.groups import GROUP_OF, GROUPS

_GROUPS = {group.name: group for group in GROUPS}


def flat(values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Options with flat names: the mapping under a group's name is taken apart.

    An option that its group does not know keeps the group's name before its own (``calibration.smaples``), so that the
    validation refuses it together with all other problems.

    Raises:
        ConfigError: If an option is given in both forms.
    """
    found: dict[Any, Any] = {}
    for key, value in values.items():
        for name, entry in _entries(key, value).items():
            if name in found:
                group = GROUP_OF[name]
                raise ConfigError(
                    f"The recipe has {name} twice: by itself, and as {group.inner[name]} of the group {group.name}.",
                    "Leave one of them.",
                )
            found[name] = entry
    return found


def _entries(key: Any, value: Any) -> dict[Any, Any]:
    """Options that one entry of a recipe gives, with flat names."""
    group = _GROUPS.get(key) if isinstance(key, str) else None
    if group is None or not (isinstance(value, Mapping) or (value is None and key not in GROUP_OF)):
        return {key: value}
    flat_names = {inner: name for name, inner in group.inner.items()}
    return {
        flat_names.get(inner, f"{group.name}.{inner}"): entry for inner, entry in with_underscores(value or {}).items()
    }


def grouped(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Flat options in groups, in the order of the groups and their options."""
    groups = {
        group.name: {inner: values[name] for name, inner in group.inner.items() if name in values} for group in GROUPS
    }
    return {name: options for name, options in groups.items() if options}
