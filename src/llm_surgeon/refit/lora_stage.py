"""The stage that trains low-rank corrections after a shot."""

from __future__ import annotations

from collections.abc import Sequence

from llm_surgeon.curvature import estimate
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.passes.batch_major import Estimation
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import Figure
from llm_surgeon.refit.lora import Corrected, Corrections, correct, require_peft
from llm_surgeon.refit.stage import Advance, Fitted, LiveBytes, Measure, Order, Parts, Shot, Stage, TracedBytes, Tracer
from llm_surgeon.session.session import Session


class CorrectionStage(Stage):
    """First-order corrections: low-rank adapters, trained for a short while and absorbed."""

    name = "correction"
    streams = False

    @classmethod
    def wanted(cls, config: PruneConfig) -> bool:
        """Whether a recipe trains corrections."""
        return config.lora

    @classmethod
    def check(cls, config: PruneConfig) -> None:
        """Check that the optional package ``peft`` is installed; see ``require_peft``."""
        require_peft()

    def work(self, shot: Shot, half: int | None) -> int:
        """Number of tokens of all steps."""
        config = self.session.config
        return self._how(shot).steps * config.lora_batch_size * self.session.tokens.seq_len

    def fit(self, shot: Shot, half: int | None, advance: Advance) -> Fitted:
        """Train in the first process, whose weights the others take over."""
        session, config = self.session, self.session.config

        def train() -> Corrected:
            return correct(
                session.model,
                session.anatomy,
                shot.elements,
                session.tokens,
                self._how(shot),
                batch_size=config.lora_batch_size,
                precision=config.precision,
                # Each shot has sequences and random factors of its own.
                seed=config.seed + shot.number,
                advance=advance,
            )

        found = session.processes.from_first(train)
        for layer in session.anatomy.layers.values():
            core = core_of(session.model, layer)
            core.weight.data = session.processes.broadcast(core.weight.data, 0)
        return Fitted(
            (
                Figure(name="correction steps", value=found.steps, kind="count"),
                Figure(name="first loss", value=found.first_loss, kind="loss"),
                Figure(name="last loss", value=found.last_loss, kind="loss"),
            ),
            "The first and the last loss are those of the batches of the first and the last correction step.",
        )

    def _how(self, shot: Shot) -> Corrections:
        config = self.session.config
        return Corrections(
            rank=config.lora_rank,
            learning_rate=config.lora_learning_rate,
            steps=config.lora_final_steps if shot.number == config.shots else config.lora_steps,
        )

    @classmethod
    def trace(cls, tracer: Tracer, config: PruneConfig) -> int:
        """Bytes of a batch with its gradients."""
        how = Estimation(config.lora_batch_size, config.precision)

        def prepare(session: Session) -> Measure:
            def measure(live: LiveBytes) -> int:
                factors = estimate(session, {}, how)
                return live.peak - factors.nbytes

            return measure

        return tracer.by_depth(prepare, config.lora_batch_size)

    @classmethod
    def memory(cls, skeleton: Skeleton, config: PruneConfig, traced: TracedBytes) -> Parts:
        """Bytes of a pass with gradients, and of low-rank factors in float32 with their gradients and two moments."""
        sides = sum(layer.rows + layer.columns for layer in skeleton.anatomy.layers.values())
        return {"passes": traced.stages[cls.name], "adapters": 4 * 4 * config.lora_rank * sides}

    @classmethod
    def operations(cls, skeleton: Skeleton, config: PruneConfig, kept: Sequence[float], order: Order) -> float:
        """Operations of forward and backward passes of all steps, gradients of weights included."""
        steps = config.lora_steps * (config.shots - 1) + config.lora_final_steps
        return 6.0 * skeleton.parameters * steps * config.lora_batch_size * config.seq_len
