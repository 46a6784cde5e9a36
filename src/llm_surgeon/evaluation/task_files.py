"""Task files, lm-eval's and the user's own: single tasks looked up by the names of tasks, groups and tags."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from llm_surgeon.errors import ConfigError
from llm_surgeon.evaluation.other_packages import one_line, quiet_packages

# Key of the file whose dataset_kwargs hold. It is kept among the settings, so that it follows the same precedence.
_DATA_FILE = "file of dataset_kwargs"
# Keys of a file that are of groups, and not of what is measured.
_OF_GROUPS = {"group", "group_alias", "task", "task_alias", "tag", "aggregate_metric_list"}


class UnknownTaskError(ConfigError):
    """A name that belongs to no task and to no group."""


@dataclass(frozen=True)
class SingleTask:
    """A task to measure.

    Attributes:
        name: Name of the task; ``group::name`` if a group defines it itself.
        own_file: File of the task; None if a group defines it.
        file: The file that names the task's data.
        changes: Settings by the groups that led to the task, which go before those of its own file.
    """

    name: str
    own_file: Path | None
    file: Path
    changes: Mapping[str, Any]

    def settings(self, functions: bool = True) -> dict[str, Any]:
        """All settings of the task.

        Args:
            functions: Whether to load the Python functions that settings name, which runs their code; else the names
                are kept.
        """
        own = {} if self.own_file is None else load_yaml(self.own_file, resolve_func=functions)
        settings = {**own, **self.changes}
        return {key: settings[key] for key in settings if key not in {*_OF_GROUPS, _DATA_FILE}} | {"task": self.name}


def find(names: Sequence[str], include_path: Path | None) -> dict[str, SingleTask]:
    """Look up single tasks, groups and tags.

    Args:
        names: Names of tasks, groups or tags.
        include_path: Directory with task files of the user's own.

    Returns:
        The single tasks by name.

    Raises:
        ConfigError: If a name is not known, or a group is malformed.
    """
    path = None if include_path is None else str(include_path)
    with quiet_packages():
        # lm-eval has thousands of files, and reading them takes seconds. Often the user's own are enough.
        with suppress(UnknownTaskError):
            return _single_tasks(TaskManager(include_path=path, include_defaults=False), names)
        return _single_tasks(TaskManager(include_path=path), names)


def _single_tasks(index: Any, names: Sequence[str]) -> dict[str, SingleTask]:
    chosen: dict[str, SingleTask] = {}
    for name in names:
        for task in _members(index, name, Path(), {}, ()):
            if chosen.setdefault(task.name, task) != task:
                raise ConfigError(
                    f"The task {task.name!r} is asked for twice, with different settings.",
                    f"Name only one of the groups that change it, or leave it out beside {name!r}.",
                )
    return chosen


def _members(
    index: Any, entry: Any, file: Path, changes: Mapping[str, Any], groups: tuple[str, ...]
) -> Iterator[SingleTask]:
    """Yield the single tasks that an entry in a group's list stands for, in order.

    Args:
        index: lm-eval's index.
        entry: A name; or settings with the name of a known task or group, or of one that is defined here.
        file: The group's file; not used for a name that the user asked for.
        changes: Settings by the groups around the entry.
        groups: Names of these groups; none for a name that the user asked for.
    """
    settings = entry if isinstance(entry, dict) else {"task": entry}
    name = settings.get("group", settings.get("task"))
    if not isinstance(name, str):
        raise ConfigError(f"The group {groups[-1]!r} lists {entry!r}, which names no task.", f"Correct it in {file}.")
    if name in groups:
        raise ConfigError(f"The group {name!r} contains itself.", f"Take it out of the tasks of {groups[-1]!r}.")
    changes = {**changes, **_of_tasks(settings, file)}
    known = index.task_index.get(name)
    if known is None and "group" in settings:
        yield from _members_of_group(index, {**settings, "group": f"{groups[-1]}::{name}"}, file, changes, groups)
    elif known is None and changes.keys() & {"dataset_path", "custom_dataset", "class"}:
        yield SingleTask(f"{groups[-1]}::{name}", None, changes.get(_DATA_FILE, file), changes)
    elif known is None:
        raise _unknown(index, name, groups)
    elif name in index.all_tags:
        yield from _members_of_group(index, {"group": name, "task": sorted(known.tags)}, file, changes, groups)
    elif name in index.all_groups:
        yield from _members_of_group(index, _settings_of_group(known), known.yaml_path, changes, groups)
    else:
        yield SingleTask(name, known.yaml_path, changes.get(_DATA_FILE, known.yaml_path), changes)


def _members_of_group(
    index: Any, group: Mapping[str, Any], file: Path, changes: Mapping[str, Any], groups: tuple[str, ...]
) -> Iterator[SingleTask]:
    """Yield the single tasks of a group that ``file`` defines; the group's settings hold for all its tasks."""
    name, members = group["group"], group.get("task")
    members = [members] if isinstance(members, str) else members
    if not isinstance(members, list) or not members:
        raise ConfigError(f"The group {name!r} has no list of tasks.", f"Add one under the key task in {file}.")
    for member in members:
        yield from _members(index, member, file, {**_of_tasks(group, file), **changes}, (*groups, name))


def _of_tasks(settings: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Settings of tasks among those of a group or of an entry in its list."""
    of_groups = {*_OF_GROUPS, "metadata"} if "group" in settings else _OF_GROUPS
    changes = {key: value for key, value in settings.items() if key not in of_groups}
    return {**changes, _DATA_FILE: file} if "dataset_kwargs" in settings else changes


def _settings_of_group(entry: Any) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = load_yaml(entry.yaml_path)
    except Exception as error:  # its Python code is run
        raise ConfigError(
            f"The group {entry.name!r} cannot be read: {one_line(error)}.", f"Correct its file {entry.yaml_path}."
        ) from error
    return settings


def _unknown(index: Any, name: str, groups: Sequence[str]) -> UnknownTaskError:
    named = f", which the group {groups[-1]!r} names," if groups else ""
    for file in sorted(Path(index.include_path).rglob("*.yaml")) if index.include_path else ():
        try:
            load_yaml(file, resolve_func=False)
        except (OSError, ValueError, yaml.YAMLError) as error:
            # lm-eval passes over a file that it cannot read, and most likely this one is the task's.
            return UnknownTaskError(
                f"The task {name!r}{named} is not known, and the task file {file} cannot be read: {one_line(error)}.",
                "Correct that file, or the name of the task.",
            )
    known = index.all_tasks
    close = get_close_matches(name, known, n=5) or [other for other in known if other.startswith(name)][:5]
    similar = f"Similar names: {', '.join(close)}." if close else "No task has a similar name."
    return UnknownTaskError(
        f"The task {name!r}{named} is not known.",
        f"{similar} Tasks of your own are files that end in .yaml in the directory given with --tasks-path.",
    )
