"""The table of loops."""

from __future__ import annotations

from llm_surgeon.pruning.layerwise import BlockByBlock
from llm_surgeon.pruning.loop import Loop
from llm_surgeon.pruning.shots import GlobalShots
from llm_surgeon.recipe.config import PruneConfig

LOOPS: dict[str, Loop] = {loop.name: loop for loop in (GlobalShots(), BlockByBlock())}


def register_loop(loop: Loop) -> None:
    """Let rows of methods name a loop of your own, within this process.

    Raises:
        ValueError: If the name is taken.
    """
    if loop.name in LOOPS or not loop.name:
        raise ValueError(f"the name {loop.name!r} is taken; taken are {', '.join(LOOPS)}")
    LOOPS[loop.name] = loop


def loop_of(config: PruneConfig) -> Loop:
    """The loop of a recipe's method."""
    return LOOPS[config.loop]
