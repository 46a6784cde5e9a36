"""The fits after a shot in their order, with their states on disk: a later process goes on where one has ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from llm_surgeon.models.streaming import weights_of
from llm_surgeon.recipe.config import HALVES
from llm_surgeon.records import DoneFit, FitMark, NoWords, Spent
from llm_surgeon.refit.cross_fit import OtherWeights, fitted_parameters
from llm_surgeon.refit.stage import Fitted, Steps
from llm_surgeon.session.marks import Mark
from llm_surgeon.session.session import Session
from llm_surgeon.system.clock import Clock

# Marks of the weights that are fitted, and of the first model of cross-fitting while the second is fitted.
_FITS, _FIRST = "fits", "first"
# Kinds of the tensors of a mark: parameters by number, and what a fit keeps beside them.
_WEIGHTS, _KEPT = "weight", "kept"


@dataclass
class Fit:
    """One fit.

    Attributes:
        steps: Steps that are done, and where to tell of further ones.
        found: Figures of the fit; None until it is complete.
    """

    steps: Steps
    found: Fitted | None = None


class Fits:
    """All fits after one shot.

    Args:
        session: The run, whose model is as the shot's removals have left it.
        clock: Clock of the shot.
        beside: Names of parameters that stages change beside the prunable layers and the last norm.
        count: Number of fits.
        crosses: Whether the fits are those of two models of cross-fitting at first, see ``turns``.
    """

    def __init__(self, session: Session, clock: Clock, beside: Sequence[str], count: int, *, crosses: bool) -> None:
        self._session, self._clock, self._beside, self._count = session, clock, tuple(beside), count
        self._done: list[DoneFit] = []
        self._turn: int | None = None
        self._other: OtherWeights | None = None
        self._former, self._first = self._read()
        self._first_kept = self._first is not None
        if self._former is not None:
            clock.take_over(self._former.words.spent.stages, self._former.words.spent.profile)
            if not crosses:
                self._take(self._former)

    def turns(self) -> Iterator[int]:
        """Numbers of the models of cross-fitting, to be fitted in turn; in the end the model has their mean."""
        other = self._other = OtherWeights(self._session.model, self._session.anatomy, self._beside)
        former = self._former
        for turn in range(HALVES):
            self._turn = turn
            if turn:
                if self._first is not None:
                    self._take(self._first)
                # The second half begins with the weights that the first began with, and the first half's weights wait.
                other.exchange()
            if former is not None and former.words.turn == turn:
                self._take(former)
            yield turn
        if former is not None and former.words.turn is None:
            self._take(former)
        else:
            other.take_mean()
        self._other = self._turn = None

    @contextmanager
    def step(self, stage: str) -> Iterator[Fit]:
        """Measure one fit; it is complete already if an earlier process has kept it."""
        number, former = len(self._done), self._former
        if former is not None and number < len(former.words.done):
            done = former.words.done[number]
            self._done.append(done)
            yield Fit(Steps(), Fitted(done.figures, done.note))
            return
        steps = Steps(tell=self._keep)
        if former is not None and number == len(former.words.done) and former.words.steps:
            steps = Steps(former.words.steps, dict(former.tensors(_KEPT)), self._keep)
        fit = Fit(steps)
        with self._clock.phase(stage):
            yield fit
        assert fit.found is not None, "a fit has figures"
        self._done.append(DoneFit(stage=stage, figures=fit.found.figures, note=fit.found.note))
        if len(self._done) < self._count:
            self._keep(0, {})

    def _keep(self, steps: int, kept: Mapping[str, Tensor]) -> None:
        """Keep the state of the fits on disk, if the last one was kept long ago."""
        session, other = self._session, self._other
        if not session.marks.due():
            return
        if session.store is not None:
            session.store.keep_within(much=True)
        if self._turn and other is not None and not self._first_kept:
            session.marks.write(_FIRST, lambda: _numbered(other.kept), NoWords())
            self._first_kept = True
        spent = Spent(stages=self._clock.records(), profile=self._clock.profile())
        words = FitMark(done=tuple(self._done), turn=self._turn, steps=steps, spent=spent)
        beside = {f"{_KEPT}/{name}": tensor for name, tensor in kept.items()}
        session.marks.write(_FITS, lambda: _numbered(self._parameters()) | beside, words)

    def _read(self) -> tuple[Mark[FitMark] | None, Mark[NoWords] | None]:
        """Marks of an earlier process: of the fits, and of the first model of cross-fitting if the second is fitted."""
        marks = self._session.marks
        fits = marks.read(_FITS, FitMark)
        if fits is None or not fits.words.turn:
            return fits, None
        first = marks.read(_FIRST, NoWords)
        return (None, None) if first is None else (fits, first)

    def _take(self, mark: Mark[Any]) -> None:
        """Write the weights of a mark into the model."""
        parameters, weights = self._parameters(), weights_of(self._session.model)
        for number, tensor in mark.tensors(_WEIGHTS):
            weights.write(parameters[int(number)], tensor)

    def _parameters(self) -> list[nn.Parameter]:
        return fitted_parameters(self._session.model, self._session.anatomy, self._beside)


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{_WEIGHTS}/{number}": tensor.detach().contiguous() for number, tensor in enumerate(tensors)}
