"""Speed of prefill and cached decoding in tokens per second, as measured and never inferred from sparsity."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.errors import ConfigError, ModelError
from llm_surgeon.models.modes import frozen
from llm_surgeon.records import Speed, SpeedComparison


@dataclass(frozen=True)
class Workload:
    """Work that is timed: prefill of ``prompt`` tokens, then ``generate`` greedy steps with its cache.

    ``batch`` sequences go side by side. The whole is timed ``repeats`` times, after one run that is not counted.

    Raises:
        ConfigError: If a number is below 1.
    """

    prompt: int = 512
    generate: int = 32
    batch: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"{name} of the speed measurement is {value}.", "Give a number of at least 1.")

    def check_positions(self, positions: int | None) -> None:
        """Make sure that prompt and generated tokens fit into a model's positions; None is no limit.

        Raises:
            ConfigError: If they do not fit.
        """
        if positions is not None and self.prompt + self.generate > positions:
            raise ConfigError(
                f"{self.prompt} prompt and {self.generate} generated tokens exceed the model's {positions} positions.",
                "Time a shorter prompt or fewer generated tokens.",
            )


@dataclass(frozen=True)
class Rates:
    """Tokens per second of one run."""

    prefill: float
    decode: float


Run = Callable[[], Rates]


def compare_speed(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    prompt: int = 512,
    generate: int = 32,
    batch: int = 1,
    repeats: int = 5,
    device: torch.device | str | None = None,
) -> SpeedComparison:
    """Time two models in alternating pairs, so that a machine that warms up or is shared slows both alike.

    The models are used as they are: in their own dtype, where they lie, with random prompts from a fixed seed.

    Args:
        dense: The model before pruning.
        pruned: The model after it.
        prompt: Tokens per sequence of the prefill.
        generate: Tokens per sequence decoded after it, one at a time.
        batch: Sequences side by side.
        repeats: Pairs of runs.
        device: Device of both models; unset: that of the dense one.

    Returns:
        Medians in tokens per second (of all sequences together), and medians of the ratios pruned to dense.

    Raises:
        ConfigError: If a number is below 1, or the models have too few positions for prompt and generated tokens.
        ModelError: If a model is on another device.
    """
    work = Workload(prompt, generate, batch, repeats)
    dense_rates, pruned_rates = _time_in_turn([dense, pruned], work, torch.device(device or dense.device))
    prefill_ratio, decode_ratio = ratios(dense_rates, pruned_rates)
    return SpeedComparison(
        dense=speed_of(dense, dense_rates, work),
        pruned=speed_of(pruned, pruned_rates, work),
        prefill_ratio=prefill_ratio,
        decode_ratio=decode_ratio,
    )


def measure_speed(model: PreTrainedModel, work: Workload | None = None) -> Speed:
    """Time one model on its own device; to compare two models, ``compare_speed`` is fairer.

    Args:
        model: The model.
        work: The work to time; unset: the default ``Workload``.

    Raises:
        ConfigError: If the model has too few positions.
    """
    work = work or Workload()
    (rates,) = _time_in_turn([model], work, model.device)
    return speed_of(model, rates, work)


@contextmanager
def ready_to_time(models: Sequence[PreTrainedModel], work: Workload, device: torch.device) -> Iterator[Tensor]:
    """Keep models in evaluation mode without gradients while they are timed.

    Args:
        models: All models to be timed.
        work: The work to time.
        device: Device on which the models have to be.

    Yields:
        The prompts ``[batch, prompt]`` on the device: random, from a fixed seed, the same for all models.

    Raises:
        ConfigError: If a model has too few positions.
        ModelError: If a model is on another device.
    """
    for model in models:
        _check(model, work, device)
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    seeded = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocabulary, (work.batch, work.prompt), generator=seeded).to(device)
    with ExitStack() as modes, torch.inference_mode():
        for model in models:
            modes.enter_context(frozen(model))
        yield token_ids


def warm_run(model: PreTrainedModel, token_ids: Tensor, generate: int) -> Run:
    """Run of a model as it is, done once already: memory is allocated and kernels are chosen in the first run."""
    run = partial(time_run, model, token_ids, generate, pass_options(model))
    run()
    return run


def in_turn(runs: Sequence[Run], repeats: int) -> list[list[Rates]]:
    """Do the runs one after the other, ``repeats`` times; returns one list of rates per run."""
    rates: list[list[Rates]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, measured in zip(runs, rates, strict=True):
            measured.append(run())
    return rates


def ratios(before: Sequence[Rates], after: Sequence[Rates]) -> tuple[float, float]:
    """Medians of the pairs' ratios of ``after`` to ``before``, for prefill and for decoding."""
    pairs = list(zip(before, after, strict=True))
    return (
        median(second.prefill / first.prefill for first, second in pairs),
        median(second.decode / first.decode for first, second in pairs),
    )


def pass_options(model: PreTrainedModel) -> dict[str, Any]:
    """Options that every pass of the model is called with besides its tokens."""
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # generation reads the last position only
    return options


def time_run(forward: Callable[..., Any], token_ids: Tensor, generate: int, options: Mapping[str, Any]) -> Rates:
    """Time one prefill and the decoding after it.

    Args:
        forward: The model, or a function to call instead.
        token_ids: The prompts ``[batch, prompt]``.
        generate: Tokens per sequence decoded.
        options: The options from ``pass_options``, with a cache under the name ``cache_argument`` if the prefill is to
            fill one.
    """
    synchronise(token_ids.device)
    start = perf_counter()
    output = forward(input_ids=token_ids, **options)
    synchronise(token_ids.device)
    prefilled = perf_counter()
    for _ in range(generate):
        next_ids = output.logits[:, -1:].argmax(dim=-1)
        name = "cache" if hasattr(output, "cache") else "past_key_values"
        output = forward(input_ids=next_ids, **{**options, name: getattr(output, name)})
    synchronise(token_ids.device)
    end = perf_counter()
    batch = token_ids.shape[0]
    return Rates(prefill=token_ids.numel() / (prefilled - start), decode=batch * generate / (end - prefilled))


def cache_argument(model: PreTrainedModel) -> str:
    """Name of the key/value cache among a model's arguments; transformers renamed it with version 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def speed_of(model: PreTrainedModel, rates: Sequence[Rates], work: Workload) -> Speed:
    """Record of a model's speed: the medians of its runs, and the work that was timed."""
    return Speed(
        prefill=median(rate.prefill for rate in rates),
        decode=median(rate.decode for rate in rates),
        prompt=work.prompt,
        generated=work.generate,
        batch=work.batch,
        repeats=work.repeats,
        device=describe(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def describe(device: torch.device) -> str:
    """Describe a device in words: a rate means nothing without the GPU's name or the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def _time_in_turn(models: Sequence[PreTrainedModel], work: Workload, device: torch.device) -> list[list[Rates]]:
    """Run the models one after the other, ``repeats`` times; returns one list of rates per model."""
    with ready_to_time(models, work, device) as token_ids:
        runs = [warm_run(model, token_ids, work.generate) for model in models]
        return in_turn(runs, work.repeats)


def _check(model: PreTrainedModel, work: Workload, device: torch.device) -> None:
    # An empty tensor resolves the device: "cuda" without an index means the current GPU, whatever its index.
    if torch.empty(0, device=device).device != model.device:
        raise ModelError(
            f"A model to be timed is on {model.device}, not on {device}.", "Move both models to one device first."
        )
    work.check_positions(getattr(model.config.get_text_config(), "max_position_embeddings", None))


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done its work, which goes on after a call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
