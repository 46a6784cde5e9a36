"""Pairs of models timed in turn, as they are or compiled; a model that fails is put on record."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.benchmark.compiled import compiled_run
from llm_surgeon.evaluation.speed import Run, Workload, in_turn, ratios, ready_to_time, speed_of, warm_run
from llm_surgeon.records import Failure
from llm_surgeon.records.bench import BenchRun, BenchTiming
from llm_surgeon.system.worker import failure_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Attempt:
    """A model of a pair: ready to be timed, or without a run and with the failure in ``timing``."""

    model: PreTrainedModel
    run: Run | None
    timing: BenchTiming


def time_pair(
    names: Sequence[str], models: Sequence[PreTrainedModel], work: Workload, compiled: bool, device: torch.device
) -> BenchRun:
    """Time the reference and another model in alternating pairs, or one model alone.

    Args:
        names: Names of the models, for the record.
        models: One or two models, the reference first; if one of them fails, the other is timed alone.
        work: The work to time.
        compiled: Whether to compile the models first.
        device: Device of the models.

    Raises:
        ConfigError: If a model has too few positions.
        ModelError: If a model is on another device.
    """
    fresh = _fresh_compiler() if compiled else nullcontext()
    with fresh, ready_to_time(models, work, device) as token_ids:
        attempts = [
            _attempt(name, model, token_ids, work.generate, compiled) for name, model in zip(names, models, strict=True)
        ]
        rates = iter(in_turn([attempt.run for attempt in attempts if attempt.run], work.repeats))
    timings, measured = [], []
    for attempt in attempts:
        timing = attempt.timing
        if attempt.run:
            measured.append(next(rates))
            timing = timing.model_copy(update={"speed": speed_of(attempt.model, measured[-1], work)})
        timings.append(timing)
    prefill, decode = ratios(*measured) if len(measured) == 2 else (None, None)
    return BenchRun(
        batch=work.batch, compiled=compiled, timings=tuple(timings), prefill_ratio=prefill, decode_ratio=decode
    )


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    """Reset torch's compiler before and after: earlier programs do not count towards its limits, and none stay."""
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()


def _attempt(name: str, model: PreTrainedModel, token_ids: Tensor, generate: int, compiled: bool) -> _Attempt:
    try:
        if not compiled:
            return _Attempt(model, warm_run(model, token_ids, generate), BenchTiming(model=name))
        run, seconds = compiled_run(model, token_ids, generate)
        return _Attempt(model, run, BenchTiming(model=name, compile_seconds=seconds))
    except Exception as error:  # compilers raise errors of many kinds
        logger.debug("%s cannot be timed", name, exc_info=True)
        return _Attempt(model, None, BenchTiming(model=name, failure=_failure(error)))


def _failure(error: Exception) -> Failure:
    """Failure with the error in one sentence; torch explains at length."""
    if "No working C++ compiler" in str(error):
        return Failure(cause="There is no C++ compiler.", remedy="Install one, e.g. g++, or measure without --compile.")
    failure = failure_of(error)
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    # Some errors begin with a heading, such as "backend='inductor' raised:".
    cause = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return failure.model_copy(update={"cause": f"{cause.rstrip('.')}."})
