"""Models measured side by side: loading time and memory in isolated processes, speed in pairs with a reference."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llm_surgeon.benchmark.isolated import IsolatedOrder, measure_in_process
from llm_surgeon.benchmark.pairs import time_pair
from llm_surgeon.errors import ConfigError, ModelError
from llm_surgeon.evaluation.speed import Workload, describe
from llm_surgeon.models.loading import (
    check_checkpoint,
    check_dtype,
    load_model,
    local_directory,
    positions_of,
    resolve_device,
    resolve_source,
)
from llm_surgeon.records import Failure
from llm_surgeon.records.bench import Bench, BenchModel, BenchRun, OwnMeasures
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Setting:
    """Settings that all models are measured with: one workload for each batch, device and type."""

    works: tuple[Workload, ...]
    compiled: bool
    device: torch.device
    dtype: str
    trust_remote_code: bool = False


def bench(
    models: str | Path | Sequence[str | Path],
    against: str | Path | None = None,
    batches: Sequence[int] = (1, 8),
    prompt: int = 512,
    generate: int = 32,
    repeats: int = 5,
    compiled: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    command: str | None = None,
    trust_remote_code: bool = False,
) -> Bench:
    """Measure loading time, peak memory and speed of models, each against a reference.

    Args:
        models: Exports of this package, Hugging Face directories, hub ids, or ``demo``: one or several.
        against: The reference, given like a model; unset: the first of the models.
        batches: Sequences side by side; everything is measured for each of these numbers.
        prompt: Tokens per sequence of the prefill.
        generate: Tokens per sequence decoded after it, one at a time.
        repeats: Pairs of runs, for each batch.
        compiled: Whether to measure the speed once more with ``torch.compile``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        command: Command line, for the record.
        trust_remote_code: Whether code that a model brings may run, see ``load``.

    Returns:
        The measures, those of the reference first. A model that cannot be compiled or timed has a failure instead.

    Raises:
        ConfigError: If a number, the device or the type cannot be used, there is no model, or one has too few
            positions.
        ModelError: If a model cannot be found, loaded or run.
    """
    listed = [models] if isinstance(models, str | Path) else list(models)
    given = [str(model) for model in ([] if against is None else [against]) + listed]
    setting = _setting(batches, prompt, generate, repeats, compiled, device, dtype, trust_remote_code)
    if not listed or not batches:
        raise ConfigError("There is nothing to measure.", "Name at least one model and one batch.")
    for model in given:
        _check(model, setting)
    found = [
        BenchModel(name=name, source=str(source), own=_measure_own(name, source, setting))
        for name, source in zip(_names(given), map(local_directory, given), strict=True)
    ]
    return Bench(
        models=tuple(found),
        # In the order of the table: all models of a batch one below the other.
        runs=tuple(sorted(_runs(found, setting), key=lambda run: (run.compiled, run.batch))),
        prompt=prompt,
        generated=generate,
        repeats=repeats,
        device=describe(setting.device),
        threads=torch.get_num_threads(),
        dtype=dtype,
        versions=versions(),
        date=datetime.date.today().isoformat(),
        command=command,
    )


def _setting(
    batches: Sequence[int],
    prompt: int,
    generate: int,
    repeats: int,
    compiled: bool,
    device: str,
    dtype: str,
    trust_remote_code: bool,
) -> _Setting:
    works = tuple(Workload(prompt, generate, batch, repeats) for batch in sorted(set(batches)))
    check_dtype(dtype)
    return _Setting(works, compiled, resolve_device(device), dtype, trust_remote_code)


def _check(model: str, setting: _Setting) -> None:
    """Check a model before anything expensive, without running its code.

    Raises:
        ModelError: If there is no checkpoint, or it cannot be loaded.
        ConfigError: If the model has too few positions.
    """
    source = resolve_source(model)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ModelError(
            f"There is no config.json in {model}.",
            "Give a directory that holds a Hugging Face checkpoint, a hub id, or the word demo.",
        )
    if Path(source).is_dir():
        check_checkpoint(source, setting.trust_remote_code)
    positions = positions_of(source)
    try:
        setting.works[0].check_positions(positions)
    except ConfigError as error:
        raise ConfigError(f"{model}: {error.cause}", error.remedy) from None


def _names(given: Sequence[str]) -> list[str]:
    """Short names of models: the last part of a directory, numbered if it comes again."""
    names: list[str] = []
    for model in given:
        path = Path(model)
        short = path.resolve().name if path.is_dir() else model
        number, name = 1, short
        while name in names:
            number += 1
            name = f"{short} ({number})"
        names.append(name)
    return names


def _measure_own(name: str, source: Path, setting: _Setting) -> OwnMeasures:
    logger.info("%s: loading time and memory, in a process of its own", name)
    work = setting.works[0]
    answer = measure_in_process(
        IsolatedOrder(
            source=str(source),
            dtype=setting.dtype,
            device=str(setting.device),
            threads=torch.get_num_threads(),
            prompt=work.prompt,
            generate=work.generate,
            batches=tuple(work.batch for work in setting.works),
            trust_remote_code=setting.trust_remote_code,
        )
    )
    if answer.own is None:
        failure = answer.failure or Failure(cause="the process gave no answer.", remedy="")
        if failure.trace:
            logger.error("%s", failure.trace)
        raise ModelError(f"{name} cannot be measured: {failure.cause}", failure.remedy or "The stack trace is above.")
    return answer.own


def _runs(models: Sequence[BenchModel], setting: _Setting) -> Iterator[BenchRun]:
    """Time the reference against each of the others, one pair of models in memory at a time."""
    reference, *others = models
    first = _load(reference, setting)
    if not others:
        yield from _pair_runs([reference.name], [first], setting)
    for other in others:
        yield from _pair_runs([reference.name, other.name], [first, _load(other, setting)], setting)


def _load(model: BenchModel, setting: _Setting) -> PreTrainedModel:
    return load_model(model.source, setting.dtype, setting.device, setting.trust_remote_code)


def _pair_runs(names: Sequence[str], models: Sequence[PreTrainedModel], setting: _Setting) -> Iterator[BenchRun]:
    for compiled in (False, True) if setting.compiled else (False,):
        for work in setting.works:
            logger.info("%s: batch %d%s", " and ".join(names), work.batch, ", compiled" if compiled else "")
            yield time_pair(names, models, work, compiled, setting.device)
