"""Reports and recipes for publication: without the paths of the machine that they were made on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llm_surgeon.data.corpora import without_column
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.sources import sources_of
from llm_surgeon.records import PruneReport

# An absolute path, or one from the home directory, of at least two parts. Addresses of the web do not match, as they
# have a colon before the path.
_PART = r"[^\s/\\'\",;:<>|]+"
_PATH = re.compile(rf"(?<![\w./\\~:-])(?:~\w*|[A-Za-z]:)?[/\\]+(?:{_PART}[/\\]+)+({_PART})?")


def without_paths(report: PruneReport) -> PruneReport:
    """The report with the last part of each absolute path in place of the path.

    Exports are uploaded as they are, and the directories of their authors are nobody's business.
    """
    given = [report.model, *_texts_of(report.config)]
    if report.export is not None:
        given.append(report.export.path)
    # A path with spaces can only be found as a whole. The longest goes first, as one may be part of another.
    return PruneReport.model_validate(_masked(report.model_dump(mode="json"), _absolute(given)))


def recipe_without_paths(config: PruneConfig) -> str:
    """The resolved recipe as YAML, with the last parts of absolute paths."""
    masked: dict[str, Any] = _masked(config.model_dump(), _absolute(_texts_of(config.model_dump())))
    return PruneConfig.model_validate(masked).to_yaml()


def _texts_of(config: Mapping[str, Any]) -> list[str]:
    """Names of the texts in a recipe's options, without shares."""
    given = [config.get("calibration"), config.get("evaluation")]
    listed = [tuple(names) if isinstance(names, list | tuple) else (names,) for names in given if names]
    return [source.text for names in listed for source in sources_of(names)]


def _absolute(texts: Iterable[str]) -> list[str]:
    """Those texts that are absolute paths, with and without the names of columns; the longest first."""
    absolute = [text for text in texts if _is_absolute(text)]
    return sorted({*absolute, *(without_column(text) for text in absolute)}, key=len, reverse=True)


def _is_absolute(text: str) -> bool:
    return text.startswith("~") or Path(text).is_absolute()


def _masked(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        for path in known:
            value = value.replace(path, Path(path).name)
        return _PATH.sub(lambda found: found[1] or ".", value)
    if isinstance(value, dict):
        return {_masked(key, known): _masked(entry, known) for key, entry in value.items()}
    return [_masked(entry, known) for entry in value] if isinstance(value, list | tuple) else value
