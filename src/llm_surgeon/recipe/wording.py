"""Problems of a recipe in words: the findings of the validation, with a guess at the intended value."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.groups import GROUP_OF, GROUPS
from llm_surgeon.recipe.methods import CURVATURES, method_names
from llm_surgeon.recipe.quantity import LONGEST, closest, shown
from llm_surgeon.recipe.removed import REMOVED
from llm_surgeon.recipe.structures import STRUCTURES, UNSTRUCTURED

# Options that the command line spells in the singular, as each use of them adds one value.
_SINGULAR = {"stages": "stage", "formats": "format"}
# Options whose values are names of a table, which may have grown.
_TABLES: dict[str, Callable[[], Iterable[str]]] = {"method": method_names, "curvature": lambda: CURVATURES}
# Findings of the validation, by pydantic's names, in words that follow the name of an option.
_KINDS = {
    "int_type": "has to be a whole number",
    "float_type": "has to be a number",
    "bool_type": "has to be true or false",
    "string_type": "has to be text",
    "string_too_short": "has to be text",
    "string_unicode": "has to be text without broken characters",
    "tuple_type": "has to be a list",
    "too_short": "has to have one entry at least",
    "finite_number": "has to be a finite number",
}
_LIMITS = {
    "greater_than": "more than",
    "greater_than_equal": "at least",
    "less_than": "less than",
    "less_than_equal": "at most",
}
# Largest number of problems in a message.
_MOST_PROBLEMS = 5


def refusal(
    issues: Sequence[Mapping[str, Any]], fields: Mapping[str, FieldInfo], command: str = "prune --help-all"
) -> ConfigError:
    """Error in words for the findings of the validation.

    Args:
        issues: Findings, as pydantic gives them.
        fields: Options of a recipe, by name.
        command: Command and option that explain them.
    """
    problems = [_problem(issue, fields) for issue in issues[:_MOST_PROBLEMS]]
    if len(issues) > _MOST_PROBLEMS:
        problems.append(f"and {len(issues) - _MOST_PROBLEMS:,} more")
    # A problem of several options together names them as a recipe does.
    words = [word for issue in issues if not issue["loc"] for word in re.findall(r"\w+_\w+", issue["msg"])]
    spelt = ", ".join(spelling(word, fields) for word in dict.fromkeys(words) if word in fields)
    return ConfigError(
        f"The recipe is not valid: {'; '.join(problems)}.",
        f"{f'On the command line: {spelt}. ' if spelt else ''}`llm-surgeon {command}` explains each option.",
    )


def spelling(name: str, fields: Mapping[str, FieldInfo]) -> str:
    """Spelling of an option on the command line."""
    word = flag(name)
    return f"{word} or --no-{word.removeprefix('--')}" if fields[name].annotation is bool else word


def flag(name: str) -> str:
    """Word that sets an option on the command line."""
    return f"--{_SINGULAR.get(name, name).replace('_', '-')}"


def _problem(issue: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> str:
    """One finding of the validation in words, with the offending value if it concerns a single option."""
    message = issue["msg"].removeprefix("Value error, ")
    # The input of a problem of several options together would be the whole recipe.
    if not issue["loc"]:
        return str(message)
    name, value = str(issue["loc"][0]), issue["input"]
    if name not in fields:
        return _unknown(name, fields)
    if issue["type"] in _LIMITS:
        (limit,) = issue["ctx"].values()
        message = f"has to be {_LIMITS[issue['type']]} {f'{limit:,}' if isinstance(limit, int) else f'{limit:g}'}"
    else:
        message = _KINDS.get(issue["type"], message.replace("Input should be", "has to be", 1))
    spelt = spelling(name, fields)
    option = spelt if spelt == f"--{name}" else f"{spelt} ({name} in a recipe)"
    kind = "the text " if isinstance(value, str) and issue["type"] in ("int_type", "float_type", "bool_type") else ""
    meant = _meant(name, value, fields[name])
    return f"{option} {message} (got {kind}{shown(value)}{f'; did you mean {meant}?' if meant else ''})"


def _unknown(name: str, fields: Iterable[str]) -> str:
    """Say that a key is no option, and which option may be meant."""
    group = next((group for group in GROUPS if name.startswith(f"{group.name}.")), None)
    if group is not None:
        return _unknown_in_group(name.removeprefix(f"{group.name}."), group.name, group.inner)
    if name in REMOVED:
        return f"the option {name} was removed: {REMOVED[name]}"
    if any(group.name == name for group in GROUPS):
        return f"{name} is a group of options: give a mapping, {name}: {{option: value}}"
    meant = closest(name, fields)
    return f"{shown(name)} is no option{f' (did you mean {meant}?)' if meant else ''}"


def _unknown_in_group(key: str, group: str, inner: Mapping[str, str]) -> str:
    """Say that a key is no option of its group, and which option of which group may be meant."""
    removed = next((name for name in (key, f"{group}_{key}") if name in REMOVED), None)
    if removed is not None:
        return f"the option {removed} was removed: {REMOVED[removed]}"
    problem = f"{shown(key)} is no option of the group {group}"
    if key in GROUP_OF:
        elsewhere = GROUP_OF[key]
        return f"{problem} (did you mean {elsewhere.inner[key]}{f' of {elsewhere.name}' * (elsewhere.name != group)}?)"
    meant = closest(key, inner.values())
    return f"{problem}{f' (did you mean {meant}?)' if meant else ''}"


def _meant(name: str, value: Any, field: FieldInfo) -> str | None:
    """The value that may be meant by one that an option does not take; None without a guess."""
    bounds = [getattr(limit, "lt", getattr(limit, "le", None)) for limit in field.metadata]
    if any(bound is not None and bound <= 1 for bound in bounds):
        return _as_fraction(value)
    if not isinstance(value, str):
        return None
    if name == "structure":
        parts = [closest(part, (*STRUCTURES, UNSTRUCTURED)) for part in value[:LONGEST].split("+")]
        return "+".join(part for part in parts if part) if all(parts) else None
    return closest(value, _TABLES[name]() if name in _TABLES else _choices(field.annotation))


def _as_fraction(value: Any) -> str | None:
    """The fraction that a percentage stands for; None if the value does not look like a percentage."""
    percent = re.fullmatch(r"\s*([0-9]{1,2}(\.[0-9]{1,9})?)\s*%\s*", value) if isinstance(value, str) else None
    if percent is not None:
        return f"{float(percent[1]) / 100:g}"
    return f"{value / 100:g}" if isinstance(value, int | float) and 2 <= value < 100 else None


def _choices(annotation: Any) -> tuple[str, ...]:
    """Words that an option takes; empty if it takes other values."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for argument in get_args(annotation) for word in _choices(argument))


def takes_text(annotation: Any) -> bool:
    """Whether an option takes text, of any kind or only certain words."""
    if annotation is str or get_origin(annotation) is Literal:
        return True
    return any(takes_text(argument) for argument in get_args(annotation))
