"""Speed as measured, never inferred from sparsity: prefill and cached decoding, in tokens per second."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
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
    """What is timed: prefill of ``prompt`` tokens, then ``generate`` greedy steps with its cache.

    ``batch`` sequences go side by side. The whole is timed ``repeats`` times, after one run that is not counted.
    """

    prompt: int = 512
    generate: int = 32
    batch: int = 1
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ConfigError(f"{name} of the speed measurement is {value}.", "Give a number of at least 1.")


@dataclass(frozen=True)
class _Rates:
    """Tokens per second of one run."""

    prefill: float
    decode: float


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
        device: Where both models are; unset: where the dense one is.

    Returns:
        Medians in tokens per second (of all sequences together), and medians of the ratios pruned to dense.

    Raises:
        ConfigError: If a number is below 1, or the models have too few positions for prompt and generated tokens.
        ModelError: If a model is on another device.
    """
    work = Workload(prompt, generate, batch, repeats)
    dense_rates, pruned_rates = _time_in_turn([dense, pruned], work, torch.device(device or dense.device))
    pairs = list(zip(dense_rates, pruned_rates, strict=True))
    return SpeedComparison(
        dense=_speed(dense, dense_rates, work),
        pruned=_speed(pruned, pruned_rates, work),
        prefill_ratio=median(after.prefill / before.prefill for before, after in pairs),
        decode_ratio=median(after.decode / before.decode for before, after in pairs),
    )


def measure_speed(model: PreTrainedModel, work: Workload | None = None) -> Speed:
    """Time one model where it lies; to compare two, ``compare_speed`` is fairer. Raises as it does."""
    work = work or Workload()
    (rates,) = _time_in_turn([model], work, model.device)
    return _speed(model, rates, work)


def _time_in_turn(models: Sequence[PreTrainedModel], work: Workload, device: torch.device) -> list[list[_Rates]]:
    """Run the models one after the other, ``repeats`` times; one list of rates per model."""
    for model in models:
        _check(model, work, device)
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    seeded = torch.Generator().manual_seed(0)
    token_ids = torch.randint(vocabulary, (work.batch, work.prompt), generator=seeded).to(device)
    rates: list[list[_Rates]] = [[] for _ in models]
    with ExitStack() as modes, torch.inference_mode():
        for model in models:
            modes.enter_context(frozen(model))
        for model in models:  # memory is allocated and kernels are chosen in the first run
            _run(model, token_ids, work.generate)
        for _ in range(work.repeats):
            for model, runs in zip(models, rates, strict=True):
                runs.append(_run(model, token_ids, work.generate))
    return rates


def _run(model: PreTrainedModel, token_ids: Tensor, generate: int) -> _Rates:
    """One prefill and the decoding after it."""
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1  # generation reads the last position only
    _synchronise(token_ids.device)
    start = perf_counter()
    output = model(input_ids=token_ids, **options)
    _synchronise(token_ids.device)
    prefilled = perf_counter()
    for _ in range(generate):
        next_ids = output.logits[:, -1:].argmax(dim=-1)
        output = model(input_ids=next_ids, past_key_values=output.past_key_values, **options)
    _synchronise(token_ids.device)
    end = perf_counter()
    batch = token_ids.shape[0]
    return _Rates(prefill=token_ids.numel() / (prefilled - start), decode=batch * generate / (end - prefilled))


def _check(model: PreTrainedModel, work: Workload, device: torch.device) -> None:
    # Compared as places: "cuda" without an index means the current GPU, whichever index its tensors name.
    if torch.empty(0, device=device).device != model.device:
        raise ModelError(
            f"A model to be timed is on {model.device}, not on {device}.", "Move both models to one device first."
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and work.prompt + work.generate > positions:
        raise ConfigError(
            f"{work.prompt} prompt and {work.generate} generated tokens exceed the model's {positions} positions.",
            "Time a shorter prompt or fewer generated tokens.",
        )


def _synchronise(device: torch.device) -> None:
    """Wait for a GPU, which computes after the call has returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speed(model: PreTrainedModel, rates: Sequence[_Rates], work: Workload) -> Speed:
    return Speed(
        prefill=median(rate.prefill for rate in rates),
        decode=median(rate.decode for rate in rates),
        prompt=work.prompt,
        generated=work.generate,
        batch=work.batch,
        repeats=work.repeats,
        device=_describe(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _describe(device: torch.device) -> str:
    """The device in words: a rate means nothing without the GPU's name or the number of threads."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)
