"""Reports and recipes for publication: without the paths of the machine that they were made on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_surgeon.data.corpora import without_column
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.sources import NONE, as_several, sources_of
from llm_surgeon.records import PruneReport, RecoveryRecord
from llm_surgeon.records.names import distinct_names

# An absolute path, or one from the home directory, of at least two parts. Addresses of the web do not match, as they
# have a colon before the path.
_PART = r"[^\s/\\'\",;:<>|]+"
_PATH = re.compile(rf"(?<![\w./\\~:-])(?:~\w*|[A-Za-z]:)?[/\\]+(?:{_PART}[/\\]+)+({_PART})?")


def without_paths(report: PruneReport) -> PruneReport:
    """The report with the last part of each absolute path in place of the path.

    Exports are uploaded as they are, and the directories of their authors are nobody's business.
    """
    given = [report.model] if report.export is None else [report.model, report.export.path]
    known = {text: Path(text).name for text in given if _is_absolute(text)} | _names_of(report.config)
    return PruneReport.model_validate(_masked(report.model_dump(mode="json"), known))


def recovery_without_paths(record: RecoveryRecord) -> RecoveryRecord:
    """The record of a recovery with the last part of each absolute path in place of the path."""
    given = [text for text in (record.model, record.teacher) if text is not None]
    known = {text: Path(text).name for text in given if _is_absolute(text)} | _names_of(record.config)
    return RecoveryRecord.model_validate(_masked(record.model_dump(mode="json"), known))


def recipe_without_paths(config: PruneConfig) -> str:
    """The resolved recipe as YAML, with the last parts of absolute paths."""
    options = config.model_dump()
    masked: dict[str, Any] = _masked(options, _names_of(options))
    return PruneConfig.model_validate(masked).to_yaml()


def _names_of(config: Mapping[str, Any]) -> dict[str, str]:
    """Names in place of the absolute paths of the texts in a recipe's options, without columns and shares."""
    given = [as_several(config.get(option)) for option in ("calibration", "data", "evaluation")]
    texts = (without_column(source.text) for named in given for source in sources_of(named))
    absolute = [*dict.fromkeys(text for text in texts if _is_absolute(text))]
    return dict(zip(absolute, distinct_names(absolute, (NONE, "demo")), strict=True))


def _is_absolute(text: str) -> bool:
    return text.startswith("~") or Path(text).is_absolute()


def _masked(value: Any, known: Mapping[str, str]) -> Any:
    """A value with names in place of paths, in all that it holds."""
    if isinstance(value, str):
        # A path with spaces can only be found as a whole. The longest goes first, as one may be part of another.
        for path in sorted(known, key=len, reverse=True):
            value = value.replace(path, known[path])
        return _PATH.sub(lambda found: found[1] or ".", value)
    if isinstance(value, dict):
        return {_masked(key, known): _masked(entry, known) for key, entry in value.items()}
    return [_masked(entry, known) for entry in value] if isinstance(value, list | tuple) else value
