"""The stage that sets gates after a shot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.passes.batch_major import Estimation
from llm_surgeon.passes.operations import model_operations
from llm_surgeon.passes.task import Task
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import Figure
from llm_surgeon.refit.cross_fit import half_of
from llm_surgeon.refit.gates import (
    BACKWARD_PASSES,
    FORWARD_PASSES,
    gate_width,
    gates_of,
    moments,
    number_of_gates,
    set_gates,
    tokens_of_gates,
    warn_of_gates,
)
from llm_surgeon.refit.stage import Advance, Fitted, LiveBytes, Measure, Order, Parts, Shot, Stage, TracedBytes, Tracer
from llm_surgeon.session.session import Session


class GatesStage(Stage):
    """Newton steps on gates, by the loss of the calibration text."""

    name = "gates"
    half = "other"
    backward = True
    waits = "effects of gates"

    @classmethod
    def wanted(cls, config: PruneConfig) -> bool:
        """Whether a recipe takes steps on gates."""
        return config.gate_steps > 0

    @classmethod
    def resolved(cls, config: PruneConfig, anatomy: Anatomy) -> PruneConfig:
        """The recipe with the width of the groups of neurons that share gates."""
        return config.model_copy(update={"gate_width": gate_width(anatomy, config)})

    @classmethod
    def check_model(cls, session: Session) -> None:
        """Warn if a model has no gates, or few tokens for each."""
        if session.processes.first:
            warn_of_gates(session.anatomy, session.config)

    def work(self, shot: Shot, half: int | None) -> int:
        """Number of tokens of all steps: each step takes all tokens forward and back, and forward once more."""
        return (
            self._tokens(half).input_ids.numel() * self.session.config.gate_steps * (BACKWARD_PASSES + FORWARD_PASSES)
        )

    def fit(self, shot: Shot, half: int | None, advance: Advance) -> Fitted:
        """Set the gates by the loss of the text or, under cross-fitting, of half of it."""
        session, config = self.session, self.session.config
        how = Estimation(config.sequences_per_pass, config.precision, order=session.order)
        task = Task(session, shot.keep, how, advance, self._tokens(half))
        width = gate_width(session.anatomy, config)
        found = set_gates(task, config.gate_steps, config.gate_damping, width, shot.steps)
        return Fitted(
            (
                Figure(name="number of gates", value=found.gates, kind="count"),
                Figure(name="loss before them", value=found.first_loss, kind="loss"),
                Figure(name="loss after", value=found.last_loss, kind="loss"),
                Figure(name="largest change of a gate", value=found.largest_change, kind="share"),
                Figure(name="damping of gates", value=found.damping),
            ),
            "Gates are the numbers that heads and groups of neurons were multiplied by. The losses are those of the "
            "calibration text before the first step on them, and after the last as a parabola predicts it.",
        )

    def _tokens(self, half: int | None) -> CalibrationTokens:
        return half_of(self.session.own, half, self.session.own.n_samples)

    @classmethod
    def trace(cls, tracer: Tracer, config: PruneConfig) -> int:
        """Bytes of a batch with gradients, and of the effects of the gates at its tokens."""

        def prepare(session: Session) -> Measure:
            how = Estimation(config.sequences_per_pass, config.precision, order=session.order)
            gates = gates_of(session.anatomy, gate_width(tracer.anatomy, config))
            gates = [replace(gate, members=tracer.fake(gate.members)) for gate in gates]

            def measure(live: LiveBytes) -> int:
                if gates:
                    moments(Task(session, {}, how), gates)
                return live.peak

            return measure

        return tracer.by_depth(prepare)

    @classmethod
    def memory(cls, skeleton: Skeleton, config: PruneConfig, traced: TracedBytes) -> Parts:
        """Bytes of a pass with its gradients, and of the products of the effects of all gates."""
        return {"passes": traced.stages[cls.name], "Fisher of gates": 4 * cls._count(skeleton, config) ** 2}

    @classmethod
    def waiting(cls, skeleton: Skeleton, config: PruneConfig, order: Order) -> int:
        """Bytes of the effects of all gates at all tokens that set them; layer by layer they come as states go."""
        tokens = tokens_of_gates(config)
        effects = 4 * cls._count(skeleton, config) * tokens
        if order == "batch-major":
            return effects
        states = skeleton.state_bytes(tokens)
        return max(states * skeleton.anatomy.blocks, effects) + 2 * states

    @staticmethod
    def _count(skeleton: Skeleton, config: PruneConfig) -> int:
        return number_of_gates(skeleton.anatomy, gate_width(skeleton.anatomy, config))

    @classmethod
    def operations(cls, skeleton: Skeleton, config: PruneConfig, kept: Sequence[float], order: Order) -> float:
        """Operations of the passes of all steps."""
        tokens, per_token = config.samples * config.seq_len, 0.0
        for share in kept:
            per_token += BACKWARD_PASSES * model_operations(skeleton, order, share, backward=True)
            per_token += FORWARD_PASSES * model_operations(skeleton, order, share, backward=False)
        return config.gate_steps * tokens * per_token
