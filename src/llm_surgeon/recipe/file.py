"""Recipes as files: YAML in which the option decides on the type of its value."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import yaml

from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.quantity import shown

# Limits of a recipe's file; a comparison of a hundred variants has a tenth of them.
MOST_BYTES = 100_000
MOST_VALUES = 10_000
# Python refuses to read numbers of more than 4,300 digits; no option takes as many as these.
_MOST_DIGITS = 1_000
_REMEDY = "Give a YAML file of option: value."
_MERGE = "<<"
# Plain values of YAML 1.2, without octal and hexadecimal numbers, which no option needs. PyYAML reads YAML 1.1, which
# takes 2:4 for 124, yes for a truth value, 010 for 8 and 1_000 for 1000.
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Loader(yaml.SafeLoader):
    """Parser of YAML that leaves plain scalars as they are written; ``_Reader`` decides on their types."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (as PyYAML has it)


def read_mapping(path: Path, text_options: Container[str]) -> dict[str, Any]:
    """Read a YAML recipe as a mapping of options with underscores; hyphens in keys are accepted.

    Args:
        path: The file.
        text_options: Options that take text, with underscores. Their values are taken as they are written, here and in
            mappings within. Other values without quotes are read by YAML 1.2.

    Raises:
        ConfigError: If the file cannot be read or is not a mapping.
    """
    text = _read_text(path)
    try:
        root = yaml.compose(text, Loader=_Loader)
        values = None if root is None else _Reader(text_options).value(root)
    except RecursionError:
        raise _unreadable(path, "its values are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        raise _unreadable(path, _in_words(error)) from None
    # PyYAML lets errors of some escapes and directives pass.
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise _unreadable(path, " ".join(str(error).split())) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"The recipe {path} is not a mapping.", "Write one `option: value` per line.")
    return with_underscores(values)


def with_underscores(options: Mapping[Any, Any]) -> dict[str, Any]:
    """Options with underscores in their names, as in recipes, instead of hyphens, as on the command line.

    Raises:
        ConfigError: If an option is given in both spellings.
    """
    spelt: dict[str, Any] = {}
    for key, value in options.items():
        name = str(key).replace("-", "_")
        if name in spelt:
            raise ConfigError(f"The recipe has {shown(name)} twice, with hyphens and without.", "Leave one of them.")
        spelt[name] = value
    return spelt


class _Reader:
    """Reader that makes values of the parser's nodes.

    Args:
        text_options: See ``read_mapping``.
    """

    def __init__(self, text_options: Container[str]) -> None:
        self._text_options = text_options
        self._count = 0

    def value(self, node: yaml.Node, as_text: bool = False) -> Any:
        """The value of a node; ``as_text`` makes values without quotes text, except null."""
        self._count += 1
        if self._count > MOST_VALUES:
            # An alias (*name) stands for all values of its anchor (&name): nine nestings of nine are 387 million.
            raise _error(node, f"there are more than {MOST_VALUES:,} values, each alias counted as what it stands for")
        # Without resolvers, a node has a tag of another kind only if one is written there.
        if node.tag not in (_Loader.DEFAULT_SCALAR_TAG, _Loader.DEFAULT_SEQUENCE_TAG, _Loader.DEFAULT_MAPPING_TAG):
            raise _error(node, f"the tag {shown(node.tag)} is not for recipes")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, as_text) for item in node.value]
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return _plain(node.value, as_text) if plain else node.value

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        """The value of a mapping, whose keys have to be text and unique."""
        own: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error(key_node, "a key is no word")
            key, line = key_node.value, _line(key_node)
            if key in lines:
                raise _error(key_node, f"{shown(key)} is there for the second time, after line {lines[key]}")
            lines[key] = line
            if key == _MERGE and key_node.style is None:
                merged = self._merged(value_node)
            else:
                own[key] = self.value(value_node, key.replace("-", "_") in self._text_options)
        return merged | own

    def _merged(self, node: yaml.Node) -> dict[str, Any]:
        """Entries that ``<<`` takes over from one mapping or several, of which the first has precedence."""
        value = self.value(node)
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            raise _error(node, f"what {_MERGE} takes over is no mapping")
        return {key: value for mapping in reversed(mappings) for key, value in mapping.items()}


def _plain(text: str, as_text: bool) -> Any:
    """The value of text without quotes, by YAML 1.2."""
    if text in _NULL:
        return None
    if as_text:
        return text
    if text in _BOOL:
        return _BOOL[text]
    # Text that is too long for a number stays text, so that the refusal names its option.
    if _INT.fullmatch(text) and len(text) <= _MOST_DIGITS:
        return int(text)
    if _FLOAT.fullmatch(text) and len(text) <= _MOST_DIGITS:
        return float(text)
    return float(text.replace(".", "")) if _NOT_FINITE.fullmatch(text) else text


def _read_text(path: Path) -> str:
    """The text of a file of limited size, without a byte-order mark."""
    try:
        # Reading from a pipe may never end.
        if path.exists() and not path.is_file():
            raise _unreadable(path, "it is a folder" if path.is_dir() else "it is no regular file")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise _unreadable(path, f"it has more than {MOST_BYTES:,} bytes")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _unreadable(path, "it is no UTF-8 text") from None
    # A path with a zero byte raises a ValueError.
    except (OSError, ValueError) as error:
        raise _unreadable(path, getattr(error, "strerror", None) or str(error)) from None


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _in_words(error: yaml.MarkedYAMLError) -> str:
    """The error of a file in words, with its line."""
    where = f"line {error.problem_mark.line + 1}: " if error.problem_mark is not None else ""
    return where + ", ".join(part for part in (error.context, error.problem) if part)


def _unreadable(path: Path, why: str) -> ConfigError:
    return ConfigError(f"The recipe {path} cannot be read: {why[:300]}.", _REMEDY)
