"""Metrics of tasks: a check of those asked for, the numbers that lm-eval gave, and the accuracy among them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from statistics import fmean, stdev
from typing import Any

import numpy as np
from lm_eval.api.registry import AGGREGATION_REGISTRY, METRIC_AGGREGATION_REGISTRY, METRIC_REGISTRY, get_metric

from llm_surgeon.errors import ConfigError
from llm_surgeon.evaluation.task_files import SingleTask
from llm_surgeon.records import TaskMetric

logger = logging.getLogger(__name__)

# Metrics that are a share of right answers, the preferred one first. Other metrics (a perplexity, a BLEU) have scales
# of their own, and no mean over tasks can be taken of them.
_ACCURACIES = ("acc", "acc_norm", "exact_match")
# Metric of tasks that only write answers down; its value means nothing.
_NO_METRIC = "bypass"


def check_metrics(chosen: SingleTask, settings: Mapping[str, Any]) -> None:
    """Refuse metrics that lm-eval would silently leave out.

    Raises:
        ConfigError: If a metric or an aggregation is missing or unknown.
    """
    for given in settings.get("metric_list") or ():
        metric = given.get("metric") if isinstance(given, dict) else None
        if metric is None:
            raise ConfigError(
                f"The task {chosen.name} has an entry without a metric in its metric_list: {given!r}.",
                f"Correct it in {chosen.file}, for example as metric: acc.",
            )
        aggregation = given.get("aggregation")
        if isinstance(aggregation, str) and aggregation not in AGGREGATION_REGISTRY:
            raise ConfigError(
                f"The task {chosen.name} asks for the aggregation {aggregation!r}, which lm-eval does not know.",
                f"Use one of {', '.join(sorted(AGGREGATION_REGISTRY.keys()))}, or a function (!function).",
            )
        by_name = isinstance(metric, str) and not settings.get("process_results")
        if by_name and get_metric(metric, given.get("hf_evaluate") is True) is None:
            close = get_close_matches(metric, METRIC_REGISTRY.keys()) or ["acc", "acc_norm", "exact_match"]
            raise ConfigError(
                f"The task {chosen.name} asks for the metric {metric!r}, which neither lm-eval nor the package "
                "evaluate has here.",
                f"Correct its name (to {' or '.join(close)}, for example), or give a function (!function) and an "
                "aggregation.",
            )
        name = getattr(metric, "__name__", metric)
        if aggregation is None and name not in METRIC_AGGREGATION_REGISTRY:
            raise ConfigError(
                f"The metric {name!r} of the task {chosen.name} has no aggregation.",
                f"Add one in {chosen.file}, for example aggregation: mean.",
            )


def read_metrics(chosen: SingleTask, task: Any, results: Any) -> dict[str, TaskMetric]:
    """Metrics of a measured task, by lm-eval's names; ``,filter`` follows the name where answers are filtered.

    Raises:
        ConfigError: If a metric that the task's file asks for is missing, or there is no metric at all.
    """
    metrics: dict[str, TaskMetric] = {}
    for key, value in results["results"][chosen.name].items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or name == _NO_METRIC:
            continue
        if isinstance(value, int | float | np.number):
            samples = [
                one[name] for one in results["samples"][chosen.name] if one["filter"] == filtered and name in one
            ]
            stderr = _standard_error(float(value), samples)
            metrics[name if filtered == "none" else key] = TaskMetric(value=float(value), stderr=stderr)
        else:
            logger.warning("%s: the metric %s is not a number; it is left out", chosen.name, name)
    _check_complete(chosen, task, metrics)
    return metrics


def _standard_error(value: float, samples: Sequence[Any]) -> float | None:
    """Standard error of a metric that is the mean of its samples' values; None for any other metric."""
    if len(samples) < 2 or not all(isinstance(sample, int | float | np.number) for sample in samples):
        return None
    numbers = [float(sample) for sample in samples]
    return stdev(numbers) / math.sqrt(len(numbers)) if math.isclose(fmean(numbers), value, abs_tol=1e-9) else None


def _check_complete(chosen: SingleTask, task: Any, metrics: Mapping[str, TaskMetric]) -> None:
    if not metrics:
        raise ConfigError(
            f"The task {chosen.name} gives no number.", f"Check the metric_list and process_results in {chosen.file}."
        )
    # The code of a task may rename its metrics, and so do some tasks that generate text.
    if task.get_config("process_results") is not None or task.OUTPUT_TYPE == "generate_until":
        return
    given = {key.partition(",")[0] for key in metrics}
    missing = [metric for metric in getattr(task, "_metric_fn_list", ()) if metric not in given]
    if missing:
        raise ConfigError(
            f"The task {chosen.name} asks for the metric {missing[0]!r}, which is not measured for its output_type "
            f"{task.OUTPUT_TYPE}.",
            f"Take it out of the metric_list in {chosen.file}, or measure it with process_results.",
        )


def accuracy_of(metrics: Iterable[str]) -> str | None:
    """Name of the metric that enters the mean over tasks; None if none is an accuracy."""
    keys = {key.partition(",")[0]: key for key in reversed(list(metrics))}
    return next((keys[accuracy] for accuracy in _ACCURACIES if accuracy in keys), None)
