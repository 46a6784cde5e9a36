"""The place of this process among those that torchrun has started.

This module imports no torch: commands ask for their place before they import it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from llm_surgeon.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """Number of a process, and count of processes, on all machines and on this one."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def own_place() -> Place:
    """Place of this process; the only one if torchrun has not started it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Place()
    return Place(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))


def require_one_process(command: str) -> None:
    """Make sure that a command that works in one process is run in one.

    Raises:
        ConfigError: If torchrun has started several processes.
    """
    if (count := own_place().count) > 1:
        raise ConfigError(
            f"`llm-surgeon {command}` works in one process, and torchrun has started {count}.",
            "Start it without torchrun; `llm-surgeon prune` and `recover` can use several processes.",
        )
