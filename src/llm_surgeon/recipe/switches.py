"""Switches: options that decide whether other options have an effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_surgeon.recipe.quantity import shown


@dataclass(frozen=True)
class Switch:
    """An option that decides whether other options have an effect.

    Attributes:
        option: Name of the switch.
        off: Values of the switch with which the other options have no effect, the default first.
        on: A value with which they have an effect, in words.
        others: Names of the options that depend on the switch.
    """

    option: str
    off: tuple[Any, ...]
    on: str
    others: tuple[str, ...]


SWITCHES = (
    Switch(
        "lora",
        (False,),
        "true",
        ("lora_rank", "lora_learning_rate", "lora_steps", "lora_final_steps", "lora_batch_size"),
    ),
    Switch(
        "reconstruction",
        (False,),
        "true",
        ("reconstruction_ridge", "reconstruction_copies", "reconstruction_share"),
    ),
    Switch("recover_tokens", (None,), "a number", ("recover_batch_size", "recover_learning_rate")),
    Switch("gate_steps", (0,), "1 or more", ("gate_width", "gate_damping")),
    Switch("layer_budget", ("uniform",), "owl", ("owl_multiple", "owl_spread")),
    Switch("refine", ("none", "dsnot"), "r2-dsnot", ("refine_reweight",)),
    Switch("fisher", ("empirical",), "true", ("fisher_samples",)),
)


def idle_options(values: Mapping[str, Any]) -> list[str]:
    """Names of options that have no effect because their switch is off.

    Args:
        values: Options by name; a switch that is not among them has its default.
    """
    return [
        other
        for switch in SWITCHES
        if values.get(switch.option, switch.off[0]) in switch.off
        for other in switch.others
    ]


def why_idle(option: str, values: Mapping[str, Any]) -> str:
    """Say which switch keeps an option from having an effect, and how to turn the switch on."""
    switch = next(switch for switch in SWITCHES if option in switch.others)
    value = values.get(switch.option, switch.off[0])
    state = str(value).lower() if isinstance(value, bool) else shown(value)
    return (
        f"{option} has no effect while {switch.option} is {state}: give {switch.option} {switch.on}, or leave "
        f"{option} out"
    )
