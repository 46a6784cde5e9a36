"""The socket for loops: the order of estimation, selection and update in a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from llm_surgeon.pruning.result import RunState, ShotResult
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.session.session import Session


class Loop(ABC):
    """One order of a run's phases; the row of a method names its loop.

    Attributes:
        name: Name in the rows of methods.
        sweeps: Whether the loop passes all text through the model block by block, and keeps its states in a store.
    """

    name: ClassVar[str]
    sweeps: ClassVar[bool] = False

    @abstractmethod
    def run(self, session: Session, since: RunState | None = None) -> Iterator[ShotResult]:
        """Prune the session's model in place; yields after each shot, so that the caller can evaluate and save.

        Args:
            session: The run, whose model is dense, or as it was after the shot of ``since``.
            since: State of an earlier run of the same recipe; None begins with the first shot.

        Raises:
            SurgeonError: If the model or the text does not allow the recipe.
        """

    @abstractmethod
    def phases(self, config: PruneConfig, shot: int) -> Iterator[tuple[str, str, float]]:
        """Phases of a shot before its stages, as progress shows them.

        Yields:
            Words for the progress, name of the phase in the plan, and the share of that phase's time in the shot.
        """

    def passes(self, config: PruneConfig) -> int:
        """Number of passes over the tokens in the curvature phase of a shot."""
        return 1

    def watches_grams(self, config: PruneConfig) -> bool:
        """Whether Gram matrices of inputs are taken where the loop, or a stage after it, goes from block to block."""
        return True
