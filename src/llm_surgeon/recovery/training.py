"""Training of a student: steps of AdamW with a schedule, evaluations on the way, and states from which it goes on."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.errors import NonFiniteError
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.models.modes import arithmetic
from llm_surgeon.recipe.recovery import RecoverConfig
from llm_surgeon.records import RecoveryCurves, RecoveryLoss, RecoveryPoint
from llm_surgeon.recovery.objective import Student, Teacher
from llm_surgeon.recovery.sharding import local, together
from llm_surgeon.recovery.states import BEST, STATE, States
from llm_surgeon.recovery.zeros import Zeros
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.progress import Progress, expect
from llm_surgeon.system.tensor_file import TensorFile

logger = logging.getLogger(__name__)

# Decay of AdamW's two moments: the usual ones of language models.
_BETAS = (0.9, 0.95)
# Share of the learning rate that is left at the end.
_FLOOR = 0.1
# Seconds after which a state is kept.
_OFTEN = 600.0
# Points of the curve of the loss, at most.
_POINTS = 200
_WEIGHT = "weight"
# Operations per second of the forecast before anything was measured.
_OPERATIONS = 1e11


@dataclass
class Standing:
    """How far a training is.

    Attributes:
        step: Steps taken.
        curves: Curves so far.
        best: Steps after which the perplexity was lowest; None without evaluations.
        waited: Evaluations since then.
        sum: Sum of the losses of the steps since the last point of the curve.
        seconds: Seconds of training, in all processes that worked on it one after the other.
    """

    step: int = 0
    curves: RecoveryCurves = field(default_factory=RecoveryCurves)
    best: int | None = None
    waited: int = 0
    sum: float = 0.0
    seconds: float = 0.0

    def words(self) -> dict[str, str]:
        """All of it as text; ``of`` reads it to the last bit."""
        numbers = {name: repr(getattr(self, name)) for name in ("step", "waited", "sum", "seconds")}
        return numbers | {"best": "" if self.best is None else str(self.best), "curves": self.curves.model_dump_json()}

    @classmethod
    def of(cls, words: Mapping[str, str]) -> Standing:
        """Standing of a text."""
        return cls(
            step=int(words["step"]),
            curves=RecoveryCurves.model_validate_json(words["curves"]),
            best=int(words["best"]) if words["best"] else None,
            waited=int(words["waited"]),
            sum=float(words["sum"]),
            seconds=float(words["seconds"]),
        )


class Training:
    """One training of a student.

    Args:
        student: The model that learns, whose trained parameters are float32.
        teacher: The model that it learns from; None learns from the text alone.
        tokens: ``[sequences, seq_len]``, those of all steps in their order.
        text: Held-out text; None evaluates nothing.
        config: The recipe.
        processes: Processes that share the sequences of each step.
        states: States of the training.
        progress: Display of the progress.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        tokens: Tensor,
        text: EvaluationText | None,
        config: RecoverConfig,
        processes: Processes,
        states: States,
        progress: Progress,
    ) -> None:
        self.student, self._teacher, self._tokens, self._text = student, teacher, tokens, text
        self._config, self._processes, self._states, self._progress = config, processes, states, progress
        self.parameters = {name: one for name, one in student.named_parameters() if one.requires_grad}
        # Adapters begin as zeros, and leave the zeros of their layers alone by themselves.
        self._zeros = Zeros(self.parameters if config.adapters is None else {})
        self._optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            betas=_BETAS,
            weight_decay=config.weight_decay,
        )
        self.standing = Standing()
        self._kept_at = time.perf_counter()

    @property
    def stopped_early(self) -> bool:
        """Whether the perplexity has not become better for as many evaluations as the recipe waits."""
        return self._config.patience is not None and self.standing.waited >= self._config.patience

    def run(self) -> None:
        """Train to the end, or until the perplexity becomes no better, and put the best weights in place.

        Raises:
            NonFiniteError: If the loss is not finite.
            DiskSpaceError: If a state does not fit on the disk.
        """
        since = self._states.newest()
        if since is not None:
            self._restore(since)
            logger.info("continuing after %s of %s steps", f"{since:,}", f"{self._config.steps:,}")
        elif self._text is not None:
            self._measure(self._text, "before")
        bounds = _bounds(self._config.steps, self._config.evaluations)
        expect(self._progress, self._planned(bounds))
        try:
            for number, end in enumerate(bounds, 1):
                if not self._is_complete(end) and not self.stopped_early:
                    self._go_on_to(end, f"{number}/{len(bounds)}")
        except NonFiniteError as error:
            if not self.standing.best:
                raise
            if self._processes.first:
                logger.warning("%s The weights after %s steps are taken.", error.cause, f"{self.standing.best:,}")
        best = self.standing.best
        if best is not None and best != self.standing.step:
            self._load(self._states.read(BEST, best)[0])

    def _planned(self, bounds: list[int]) -> dict[str, float]:
        """Seconds of each phase to come, in proportion: the display scales them by those that were measured."""
        operations = 2.0 * sum(one.numel() for one in self.student.parameters())
        each = (3.0 if self._teacher is None else 4.0) * operations / _OPERATIONS
        phases = {}
        for number, (start, end) in enumerate(itertools.pairwise([0, *bounds]), 1):
            turn = f"{number}/{len(bounds)}"
            phases[f"{turn}: training"] = each * self._tokens_until(end - start)
            if self._text is not None:
                phases[f"{turn}: perplexity"] = operations / _OPERATIONS * self._text.work
        return phases

    def _go_on_to(self, end: int, turn: str) -> None:
        """Train up to a step, evaluate, and keep the state."""
        if self.standing.step < end:
            self._train(end, turn)
        if self._text is not None:
            self._measure(self._text, turn)
        self._keep()

    def _is_complete(self, end: int) -> bool:
        """Whether an earlier process has trained up to a step, and has evaluated after it."""
        if self.standing.step != end or self._text is None:
            return self.standing.step >= end
        points = self.standing.curves.points
        return bool(points) and points[-1].tokens == self._tokens_until(end)

    def _tokens_until(self, step: int) -> int:
        return step * self._config.batch_size * self._config.seq_len

    def _train(self, end: int, turn: str) -> None:
        """Take steps up to one, and keep a state every few minutes."""
        batch = self._config.batch_size
        each = batch * self._config.seq_len
        with self._progress.phase(f"{turn}: training", (end - self.standing.step) * each) as phase:
            while self.standing.step < end:
                start = time.perf_counter()
                rows = slice(self.standing.step * batch, (self.standing.step + 1) * batch)
                loss = self._step(self._processes.own(self._tokens[rows]), phase.advance)  # type: ignore[arg-type]
                self.standing.step += 1
                self.standing.seconds += time.perf_counter() - start
                self._note(loss)
                if self.standing.step < end and self._processes.from_first(self._is_late):
                    self._keep()

    def _step(self, sequences: Tensor, advance: Callable[[int], None]) -> float:
        """Take a step on this process's sequences of a batch; returns the loss of all of them, in nats per token."""
        config, device = self._config, next(self.student.parameters()).device
        scored = config.batch_size * (config.seq_len - 1)
        total = torch.zeros((), dtype=torch.float64)
        for ids in sequences.split(config.sequences_per_pass):
            ids = ids.to(device)
            with arithmetic(device, config.precision):
                told = None if self._teacher is None else self._teacher(ids)
                loss = self.student(ids, told)
                # Sharded gradients become the mean over the processes.
                (loss * (self._processes.count / scored)).backward()
            total += loss.detach().double().cpu()
            # The work of all processes.
            advance(ids.numel() * self._processes.count)
        loss_of_all = self._processes.total(float(total) / scored)[0]
        if not math.isfinite(loss_of_all):
            raise NonFiniteError(
                f"The loss of step {self.standing.step + 1:,} is not finite.",
                "Lower the learning rate, or use --precision float32.",
            )
        self._zeros.clear_gradients(self.parameters)
        nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        for group in self._optimizer.param_groups:
            group["lr"] = config.learning_rate * rate(self.standing.step, config.steps, config.warmup)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss_of_all

    def _note(self, loss: float) -> None:
        """Take the loss of a step into the curve, which has a point every few steps."""
        now = self.standing
        now.sum += loss
        every = math.ceil(self._config.steps / _POINTS)
        since = now.step % every or every
        if since == every or now.step == self._config.steps:
            point = RecoveryLoss(tokens=self._tokens_until(now.step), loss=now.sum / since)
            now.curves = now.curves.model_copy(update={"losses": (*now.curves.losses, point)})
            now.sum = 0.0

    def _measure(self, text: EvaluationText, turn: str) -> None:
        """Measure the perplexity, and keep the weights if they are the best so far."""
        now, tokens = self.standing, self._tokens_until(self.standing.step)
        # Each process measures all of the text: sharded weights want all processes at each window.
        with self._progress.phase(f"{turn}: perplexity", text.work) as phase, together(self.student):
            found = perplexity(self.student.model, text, phase.advance)
        # On machines of two kinds the last digits may differ, and all have to come to the same decisions.
        found = self._processes.broadcast(found, 0)
        point = RecoveryPoint(tokens=tokens, perplexity=found, seconds=now.seconds)
        now.curves = now.curves.model_copy(update={"points": (*now.curves.points, point)})
        better = now.curves.best == point
        if self._processes.first:
            loss = f"loss {now.curves.losses[-1].loss:.4f}, " if now.curves.losses else ""
            said = f"{loss}held-out perplexity {found.perplexity:.4g}{'' if better else ' (no better)'}"
            logger.info("after %s tokens: %s", f"{tokens:,}", said)
        now.waited = 0 if better else now.waited + 1
        if better:
            now.best = now.step
            self._states.write(BEST, now.step, dict(self._weights()), {})

    def _is_late(self) -> bool:
        return time.perf_counter() - self._kept_at > _OFTEN

    def _keep(self) -> None:
        """Keep the state, and remove former ones."""
        now, tensors = self.standing, dict(self._weights())
        for name, parameter in self.parameters.items():
            # Parameters of towers that read no text have no gradient, and no moments.
            for moment, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{moment}/{name}"] = local(value)
        self._states.write(STATE, now.step, tensors, now.words())
        self._states.tidy(now.step, now.best)
        self._kept_at = time.perf_counter()

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """This process's parts of the parameters, by name."""
        for name, parameter in self.parameters.items():
            yield f"{_WEIGHT}/{name}", local(parameter.detach())

    def _load(self, tensors: TensorFile) -> None:
        """Take the parameters of a state."""
        for name, parameter in self._weights():
            parameter.copy_(tensors[name])

    def _restore(self, step: int) -> None:
        """Take up the state after a step, to the last bit."""
        tensors, words = self._states.read(STATE, step)
        self._load(tensors)
        for moment, name in (key.split("/", 1) for key in tensors):
            if moment != _WEIGHT:
                parameter, value = self.parameters[name], tensors[f"{moment}/{name}"]
                # The count of steps is a number, and every other moment is shared out as its parameter.
                kept = value if value.ndim == 0 else torch.zeros_like(parameter, requires_grad=False)
                local(kept).copy_(value)
                self._optimizer.state[parameter][moment] = kept
        self.standing = Standing.of(words)


def rate(step: int, steps: int, warmup: float) -> float:
    """Fraction of the highest learning rate at a step: it rises evenly, and falls on a cosine to a tenth.

    Args:
        step: Number of steps taken before.
        steps: Number of all steps.
        warmup: Share of the steps over which it rises.
    """
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    through = (step - rising) / max(1, steps - rising)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * through))


def _bounds(steps: int, evaluations: int) -> list[int]:
    """Steps after which to evaluate: as many as asked for, evenly spread, the last one among them."""
    return sorted({round(steps * number / evaluations) for number in range(1, evaluations + 1)} - {0})
