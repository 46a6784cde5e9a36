"""The table of stages after a shot, and the order in which a run takes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from llm_surgeon.errors import ConfigError
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.recipe.config import HALVES, PruneConfig
from llm_surgeon.recipe.stages import STAGES_KNOWN, StageRow
from llm_surgeon.records import StageRecord
from llm_surgeon.refit.cross_fit import mean_of
from llm_surgeon.refit.fits import Fits
from llm_surgeon.refit.gates_stage import GatesStage
from llm_surgeon.refit.lora_stage import CorrectionStage
from llm_surgeon.refit.reconstruction import dense_copy
from llm_surgeon.refit.reconstruction_stage import ReconstructionStage
from llm_surgeon.refit.stage import Fitted, Shot, Stage
from llm_surgeon.session.session import Session
from llm_surgeon.system.clock import Clock

# The stages are in the order in which they run.
STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (ReconstructionStage, GatesStage, CorrectionStage)}


def stages_of(config: PruneConfig) -> list[type[Stage]]:
    """Stages that a recipe wants: first the ones that its options switch on, and then the ones that it names."""
    own = [stage for stage in STAGES.values() if stage.wanted(config)]
    return own + [STAGES[name] for name in config.stages if STAGES[name] not in own]


def register_stage(stage: type[Stage], summary: str) -> None:
    """Let recipes name a stage of your own (``stages``), within this process.

    Args:
        stage: The stage. If it does not override ``wanted``, it runs where the recipe's list names it.
        summary: Purpose of the stage, in a few words.

    Raises:
        ValueError: If the name is taken.
    """
    if stage.name in STAGES or not stage.name:
        raise ValueError(f"the name {stage.name!r} is taken; taken are {', '.join(STAGES)}")
    STAGES[stage.name] = stage
    STAGES_KNOWN[stage.name] = StageRow(summary)


def check_stages(config: PruneConfig) -> None:
    """Check, before any work, that the stages of a recipe are possible on this machine.

    Raises:
        ConfigError: If something is missing, such as an optional package, or a stage cannot work with streamed weights.
    """
    for stage in stages_of(config):
        if config.weights == "streamed" and not stage.streams:
            raise ConfigError(
                f"The stage {stage.name} needs all weights where the model runs, and they are to be streamed.",
                f"Use --weights resident or auto, or leave {stage.name} out.",
            )
        stage.check(config)


def with_dense(session: Session) -> Session:
    """The session with a copy of the dense model, if a stage needs that; the session's model still has to be dense.

    Raises:
        SurgeonError: If the model does not allow a stage.
    """
    wanted = stages_of(session.config)
    for stage in wanted:
        stage.check_model(session)
    if not any(stage.needs_dense for stage in wanted):
        return session
    beside = changed_beside(session.model, session.anatomy, session.config)
    return replace(session, dense=dense_copy(session.model, session.anatomy, beside))


def changed_beside(model: nn.Module, anatomy: Anatomy, config: PruneConfig) -> list[str]:
    """Names of parameters that the stages of a recipe change beside the prunable layers."""
    names = (name for stage in stages_of(config) for name in stage.changes(model, anatomy))
    return list(dict.fromkeys(names))


def halves_of(stage: type[Stage], config: PruneConfig) -> list[int | None]:
    """Parts of the text that a stage is fitted to, one after the other: both halves, or None for all of it."""
    if not config.cross_fit or stage.half == "whole":
        return [None]
    return [half if stage.half == "own" else HALVES - 1 - half for half in range(HALVES)]


def phase_name(shot: int, shots: int, stage: str, half: int | None = None) -> str:
    """Words for a stage of a shot in the progress."""
    by = "" if half is None else f" by half {half + 1} of {HALVES}"
    return f"shot {shot}/{shots}: {stage}{by}"


def phase_names(shot: int, config: PruneConfig) -> Iterator[tuple[str, str, float]]:
    """Phases of the stages of a shot in the order in which they run: words, stage, and share of the stage's time."""
    for stage, half in _turns(stages_of(config), config):
        share = 1 / len(halves_of(stage, config))
        yield phase_name(shot, config.shots, stage.name, half), stage.name, share


def _turns(stages: list[type[Stage]], config: PruneConfig) -> Iterator[tuple[type[Stage], int | None]]:
    """Each stage with the part of the text that it takes, in order."""
    fitted = [stage for stage in stages if stage.half != "whole"]
    for turn in range(HALVES if config.cross_fit else 1):
        for stage in fitted:
            yield stage, halves_of(stage, config)[turn]
    for stage in stages:
        if stage.half == "whole":
            yield stage, None


class Stages:
    """The stages of one run."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._stages = [stage(session) for stage in stages_of(session.config)]

    def run(self, shot: Shot, clock: Clock) -> list[StageRecord]:
        """Fit the model after a shot, in place.

        Cross-fitting makes one model of each half of the text, as the stages with halves leave it, and takes the mean
        of the two models' weights. Where an earlier process has kept a state of the fits, they go on from there.

        Args:
            shot: The shot whose removals are done.
            clock: Clock that measures each stage.

        Returns:
            A record of each stage, without its time.
        """
        config, found = self._session.config, dict[str, Fitted]()
        fitted = [stage for stage in self._stages if stage.half != "whole"]
        crosses = config.cross_fit and bool(fitted)
        beside = changed_beside(self._session.model, self._session.anatomy, config)
        count = len(list(_turns([type(stage) for stage in self._stages], config)))
        fits = Fits(self._session, clock, beside, count, crosses=crosses)
        if crosses:
            models = [{stage.name: self._fit(stage, shot, turn, fits) for stage in fitted} for turn in fits.turns()]
            found |= {stage.name: mean_of(*(model[stage.name] for model in models)) for stage in fitted}
        else:
            found |= {stage.name: self._fit(stage, shot, None, fits) for stage in fitted}
        for stage in self._stages:
            if stage.half == "whole":
                found[stage.name] = self._fit(stage, shot, None, fits)
        if self._session.store is not None:
            # The weights are written to a checkpoint next.
            self._session.store.keep_within(much=True)
        return [StageRecord(name=name, seconds=0.0, figures=fit.figures, note=fit.note) for name, fit in found.items()]

    def _fit(self, stage: Stage, shot: Shot, turn: int | None, fits: Fits) -> Fitted:
        config = self._session.config
        half = None if turn is None else halves_of(type(stage), config)[turn]
        with fits.step(stage.name) as fit:
            if fit.found is None:
                stage.begin()
                words = phase_name(shot.number, config.shots, stage.name, half)
                with self._session.progress.phase(words, stage.work(shot, half)) as phase:
                    fit.found = stage.fit(replace(shot, steps=fit.steps), half, phase.advance)
        return fit.found
