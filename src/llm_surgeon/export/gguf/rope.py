"""Rotary embeddings of a model in the terms of llama.cpp: base, scaling and factors of frequencies."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.standard_layers import head_width

# Parameters of YaRN that the engine does not read for these architectures, and the values that it has.
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
# A factor by which a frequency is divided for a pair that is not rotated: the angle is zero in float32.
_NEVER = 1e30


@dataclass(frozen=True)
class Rope:
    """Rotary embeddings.

    Attributes:
        base: Base of the frequencies.
        rest: Factor for queries and keys in the dimensions that the model does not rotate. The engine multiplies all
            that it rotates by a factor of attention, and the model only its share.
        windowed_base: Base in blocks with windows, where that is another one; None otherwise.
        share: Number of dimensions of a head that the model rotates, from the first on.
        rotated: Number that the architecture rotates; more than ``share`` where it rotates whole heads.
        scaling: Keys of the file behind ``rope.scaling.``.
        factors: Tensors by name, each with a divisor for every frequency.
    """

    base: float
    share: int
    rotated: int
    windowed_base: float | None = None
    rest: float = 1.0
    scaling: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, Tensor] = field(default_factory=dict)


def rope_of(settings: Any, form: str, whole: bool) -> Rope:
    """Rotary embeddings by a model's configuration.

    Args:
        settings: Configuration of the model.
        form: Name of the format, for the message.
        whole: Whether the architecture rotates whole heads; a smaller share then becomes factors.

    Raises:
        ConfigError: If they are of a kind that llama.cpp does not compute alike.
    """
    parameters, windowed = _parameters(settings)
    width, kind = head_width(settings), rope_kind(settings)
    share = int(width * parameters.get("partial_rotary_factor", 1.0))
    base = float(parameters["rope_theta"])
    rope = Rope(base, share, width if whole else share, _windowed_base(windowed, base, form))
    partly = share != rope.rotated
    if kind == "default" and not partly:
        return rope
    if kind == "default":
        return replace(rope, factors={"rope_freqs.weight": _widened(rope, width, torch.ones(share // 2))})
    if kind == "longrope":
        return _long(rope, settings, parameters, width)
    if kind == "llama3" and not partly:
        return replace(rope, factors={"rope_freqs.weight": _llama3(base, width, parameters)})
    if kind == "linear" and not partly:
        return replace(rope, scaling={"type": "linear", "factor": float(parameters["factor"])})
    # With a base of their own, blocks with windows would be scaled too.
    if kind == "yarn" and not partly and windowed is None:
        return replace(rope, scaling=_yarn(parameters, settings, form))
    raise _refused(form, f"of the kind {kind}")


def rope_kind(settings: Any) -> str:
    """Kind of a model's rotary embeddings, by its name in transformers; empty if it has none."""
    if not getattr(settings, "rope_parameters", None):
        return ""
    return str(_parameters(settings)[0].get("rope_type", "default"))


def _parameters(settings: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Parameters of blocks with full attention, and of blocks with windows where these have their own."""
    parameters = settings.rope_parameters
    if "full_attention" in parameters:
        return parameters["full_attention"], parameters.get("sliding_attention")
    return parameters, None


def _windowed_base(parameters: dict[str, Any] | None, base: float, form: str) -> float | None:
    if parameters is None:
        return None
    if parameters.get("rope_type", "default") != "default":
        raise _refused(form, f"of the kind {parameters['rope_type']} in blocks with windows")
    return float(parameters.get("rope_theta", base))


def _yarn(parameters: dict[str, Any], settings: Any, form: str) -> dict[str, Any]:
    """Keys of YaRN; the engine's own factor of attention is taken out of the model's."""
    for name, usual in _YARN.items():
        if (value := parameters.get(name)) not in (None, usual):
            raise _refused(form, f"of the kind yarn with {name} = {value}")
    original = int(parameters.get("original_max_position_embeddings") or settings.max_position_embeddings)
    factor = parameters.get("factor")
    factor = float(factor) if factor is not None else settings.max_position_embeddings / original
    keys: dict[str, Any] = {"type": "yarn", "factor": factor, "original_context_length": original}
    attention = parameters.get("attention_factor")
    if attention is None and parameters.get("mscale") and parameters.get("mscale_all_dim"):
        attention = _magnitude(factor, parameters["mscale"]) / _magnitude(factor, parameters["mscale_all_dim"])
    if attention is not None:
        keys["attn_factor"] = attention / _magnitude(factor)
    return keys


def _magnitude(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def _long(rope: Rope, settings: Any, parameters: dict[str, Any], width: int) -> Rope:
    """Two sets of divisors, for short and for long contexts."""
    original = int(parameters.get("original_max_position_embeddings") or settings.original_max_position_embeddings)
    factor = parameters.get("factor") or settings.max_position_embeddings / original
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    factors = {
        f"rope_factors_{name}.weight": _widened(rope, width, torch.tensor(parameters[f"{name}_factor"]))
        for name in ("long", "short")
    }
    scaling = {"type": "longrope", "original_context_length": original, "attn_factor": float(attention)}
    return replace(rope, rest=1.0 if rope.rotated == rope.share else 1 / attention, scaling=scaling, factors=factors)


def _widened(rope: Rope, width: int, divisors: Tensor) -> Tensor:
    """Divisors with which the rotation of whole heads is that of a share of each, with divisors of its own.

    Args:
        rope: The rotary embeddings.
        width: Dimensions of a head.
        divisors: Divisors of the frequencies of the share ``[share / 2]``.
    """
    if rope.rotated == rope.share:
        return divisors.float()
    pair = torch.arange(rope.share // 2, dtype=torch.float64)
    found = torch.full((width // 2,), _NEVER, dtype=torch.float64)
    found[: rope.share // 2] = divisors.double() * rope.base ** (2 * pair / rope.share - 2 * pair / width)
    return found.float()


def _llama3(base: float, width: int, parameters: dict[str, Any]) -> Tensor:
    """Divisors of Llama 3: none for short waves, the whole factor for long ones, between them a mixture."""
    factor, original = float(parameters["factor"]), float(parameters["original_max_position_embeddings"])
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    waves = 2 * math.pi * base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    smooth = ((original / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def _refused(form: str, words: str) -> ConfigError:
    return ConfigError(
        f"The model has rotary embeddings {words}, which llama.cpp does not compute alike, so that the format {form} "
        "cannot say it.",
        "Leave the format out: --format hf takes the model as it is.",
    )
