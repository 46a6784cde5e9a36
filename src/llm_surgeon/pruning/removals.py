"""The removals of a shot, kept on disk before anything is fitted: a later process begins with the fits."""

from __future__ import annotations

import logging
from collections.abc import Callable

from llm_surgeon.pruning.checkpoint import restore_tensors, tensors_of
from llm_surgeon.pruning.result import ShotResult
from llm_surgeon.records import RemovalMark, Spent
from llm_surgeon.refit.stages import stages_of
from llm_surgeon.session.marks import REMOVALS
from llm_surgeon.session.session import Session
from llm_surgeon.system.clock import Clock

logger = logging.getLogger(__name__)


def removals_of(session: Session, number: int, clock: Clock, remove: Callable[[], ShotResult]) -> ShotResult:
    """Make the removals of a shot, or take over those that an earlier process has kept.

    Args:
        session: The run, whose model is as the shot before has left it.
        number: Number of the shot.
        clock: Clock of the shot, by which nothing is measured yet.
        remove: Function that removes, and returns the result of the shot without its stages.

    Raises:
        OutputError: If the kept removals are not those of this model.
    """
    found = _former(session, number, clock)
    if found is not None:
        return found
    # Marks of another shot, or of fits to other removals.
    session.marks.clear()
    result = remove()
    # Without a fit, the checkpoint of the shot is written next. All states of the fits build on this one.
    if stages_of(session.config):
        if session.store is not None:
            session.store.keep_within(much=True)
        figures = {name: getattr(result, name) for name in RemovalMark.model_fields if name != "spent"}
        words = RemovalMark(**figures, spent=Spent(stages=clock.records(), profile=clock.profile()))
        session.marks.write(
            REMOVALS, lambda: tensors_of(session.model, session.anatomy, result.state, session.config), words
        )
    return result


def _former(session: Session, number: int, clock: Clock) -> ShotResult | None:
    mark = session.marks.read(REMOVALS, RemovalMark)
    if mark is None or mark.words.shot != number:
        return None
    logger.info("continuing in shot %d, after its removals", number)
    masks, start = restore_tensors(mark.path, session.model, session.anatomy)
    clock.take_over(mark.words.spent.stages, mark.words.spent.profile)
    figures = {name: value for name, value in mark.words if name != "spent"}
    return ShotResult(**figures, masks=masks, start=start)
