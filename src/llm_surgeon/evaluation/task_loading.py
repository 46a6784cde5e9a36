"""Loading of a task with its data: paths beside its file, solved examples, and errors that name the remedy."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetNotFoundError, DatasetsError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as READERS
from lm_eval.tasks import TaskManager

from llm_surgeon.errors import ConfigError, DataError, SurgeonError
from llm_surgeon.evaluation.other_packages import hub_is_reachable, one_line, speaks_of_a_connection
from llm_surgeon.evaluation.task_files import SingleTask
from llm_surgeon.evaluation.task_metrics import check_metrics

logger = logging.getLogger(__name__)


def load_task(chosen: SingleTask, shots: int, seed: int) -> tuple[Any, int, int]:
    """Set a task up, with its data.

    Args:
        chosen: The task.
        shots: Solved examples before each question; a task that fixes them at none keeps that.
        seed: Seed of these examples.

    Returns:
        lm-eval's task, the number of documents that examples are drawn from, and how many of those are measured too.

    Raises:
        SurgeonError: If the task's file, its Python code or its data cannot be used.
    """
    # Settings for the error, should reading them with their functions fail.
    settings = chosen.settings(functions=False)
    try:
        settings = _with_absolute_paths(chosen, chosen.settings())
        check_metrics(chosen, settings)
        if _is_on_hub(settings):
            hub_is_reachable()
        (task,) = TaskManager(include_defaults=False).load([settings])["tasks"].values()
        _check_kind(chosen.name, task)
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=shots)
        task.set_fewshot_seed(seed=seed)
        return (task, *_examples(chosen.name, task))
    except SurgeonError:
        raise
    # Tasks are YAML files with templates and Python code, on data from anywhere: errors may be of any kind.
    except Exception as error:
        logger.debug("the task %s cannot be loaded", chosen.name, exc_info=True)
        raise _explained(chosen, settings, error) from error


def _has_code(settings: Mapping[str, Any]) -> bool:
    """Tell whether Python code of the task makes its data, wherever that comes from."""
    return bool({"custom_dataset", "class"} & settings.keys())


def _is_local(path: Any) -> bool:
    return isinstance(path, str) and path.startswith((".", "/", "~"))


def _is_on_hub(settings: Mapping[str, Any]) -> bool:
    """Tell whether data comes from the hub, as it does for lm-eval's own classes; for other code this is unknown."""
    if _has_code(settings):
        return "class" in settings
    path = settings.get("dataset_path") or "."
    return "hf://" in str(settings.get("dataset_kwargs")) or not (_is_local(path) or path in READERS)


def _with_absolute_paths(chosen: SingleTask, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with absolute paths to data; a relative path begins at the directory of the task's file.

    Raises:
        DataError: If a path does not exist.
        ConfigError: If no file is named.
    """
    path, kwargs = settings.get("dataset_path"), settings.get("dataset_kwargs") or {}
    if not isinstance(kwargs, Mapping):
        raise ConfigError(
            f"The dataset_kwargs of the task {chosen.name} are no keys with values: {kwargs!r}.",
            f"Correct them in {chosen.file}, for example with the key data_files.",
        )
    if _has_code(settings):
        return settings
    if _is_local(path):
        return {**settings, "dataset_path": _existing(chosen, "dataset_path", path)}
    if path not in READERS:
        return settings
    named = {key: _existing(chosen, key, kwargs[key]) for key in ("data_files", "data_dir") if kwargs.get(key)}
    if not named:
        # The reader would take every file of the working directory.
        raise ConfigError(
            f"The task {chosen.name} names no file for its data set {path}.",
            f"Name one under dataset_kwargs, as data_files, in {chosen.file}.",
        )
    return {**settings, "dataset_kwargs": {**kwargs, **named}}


def _existing(chosen: SingleTask, key: str, paths: Any) -> Any:
    """Make paths absolute: a file, a directory or a pattern of files, a list of them, or several by their split.

    Raises:
        DataError: If a path does not exist.
    """
    if isinstance(paths, Mapping):
        return {split: _existing(chosen, key, path) for split, path in paths.items()}
    if isinstance(paths, list):
        return [_existing(chosen, key, path) for path in paths]
    if "://" in str(paths):
        return paths
    absolute = chosen.file.resolve().parent / Path(paths).expanduser()
    if not absolute.exists() and not glob.glob(str(absolute), recursive=True):
        raise DataError(
            f"The data of the task {chosen.name} is not there: {absolute} does not exist.",
            f"Put it there, or correct {key} in {chosen.file}; a relative path begins at the directory of that file.",
        )
    return str(absolute)


def _check_kind(name: str, task: Any) -> None:
    """Refuse tasks that need more than a language model of text, or that run code which the model writes.

    Raises:
        ConfigError: If the task is one of these.
    """
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"The task {name} shows the model images or sound.", "Leave it out; only text is measured.")
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"The task {name} runs the code that the model writes, which is not done here.",
            "Leave it out, or measure it with lm-eval itself, in a container.",
        )


def _examples(name: str, task: Any) -> tuple[int, int]:
    """Number of documents that solved examples are drawn from, and how many of them are measured too.

    Where some are measured too, the measured document is left out of its own examples.

    Raises:
        ConfigError: If there are too few documents.
    """
    shots = task.get_config("num_fewshot") or 0
    if not shots:
        return 0, 0
    drawn_from = [_fingerprint(document) for document in task.fewshot_docs() or ()]
    measured = {_fingerprint(document) for document in task.eval_docs}
    shared = sum(document in measured for document in drawn_from)
    if len(drawn_from) - bool(shared) < shots:
        raise ConfigError(
            f"The task {name} has {len(drawn_from)} documents to draw {shots} solved examples from.",
            "Ask for fewer with --few-shot.",
        )
    if shared and hasattr(task, "fewshot_cfg"):
        # lm-eval leaves the measured document out only if these two splits are equal; the documents are chosen by now.
        task.fewshot_cfg.split = task.config.test_split
    return len(drawn_from), shared


def _fingerprint(document: Any) -> str:
    return json.dumps(document, sort_keys=True, default=str)


def _explained(chosen: SingleTask, settings: Mapping[str, Any], error: Exception) -> SurgeonError:
    """Error for a task that cannot be loaded, with the remedy for its kind."""
    name, file, data = chosen.name, chosen.file, _data_in_words(settings)
    # An error of datasets says no more than that there was one; its cause says which.
    reason = one_line(error.__cause__ or error if isinstance(error, DatasetsError) else error)
    if speaks_of_a_connection(error) and not hub_is_reachable():
        switch = " without HF_HUB_OFFLINE in the environment" if os.environ.get("HF_HUB_OFFLINE") else ""
        return DataError(
            f"The data set {data} of the task {name} is not on this machine, and the hub cannot be reached.",
            f"Connect to the network{switch}, or give a task file with local data in --tasks-path.",
        )
    if isinstance(error, DatasetNotFoundError):
        return DataError(
            f"The data set {data} of the task {name} is not found: {reason}.",
            "Check its name in the task's file, and log in to the hub if the data set asks for it.",
        )
    if isinstance(error, FileNotFoundError):
        return DataError(
            f"A file that the task {name} needs does not exist: {reason}.",
            f"Put it there, or correct its path in {file} or in the Python code that it names.",
        )
    if isinstance(error, OSError | DatasetsError):
        return DataError(
            f"The data set {data} of the task {name} cannot be read: {reason}.",
            f"Check the data, and what {file} says of its place and format.",
        )
    return ConfigError(
        f"The task {name} on the data set {data} cannot be set up: {reason}.",
        f"Check its file {file}, and that the data has what it asks for.",
    )


def _data_in_words(settings: Mapping[str, Any]) -> str:
    kwargs = settings.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    parts = (settings.get("dataset_path"), settings.get("dataset_name"), files)
    return ", ".join(str(part) for part in parts if part) or "without a name"
