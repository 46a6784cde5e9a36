"""The table of loops."""

from __future__ import annotations

from llm_surgeon.pruning.layerwise import BlockByBlock
from llm_surgeon.pruning.loop import Loop
from llm_surgeon.pruning.shots import GlobalShots
from llm_surgeon.recipe.config import PruneConfig

LOOPS: dict[str, Loop] = {loop.name: loop for loop in (GlobalShots(), BlockByBlock())}


def loop_of(config: PruneConfig) -> Loop:
    """The loop of a recipe's method."""
    return LOOPS[config.loop]
