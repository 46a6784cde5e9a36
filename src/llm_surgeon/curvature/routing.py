"""Scores of whole experts in place of a curvature: what they put out for the tokens that are sent to them.

An expert's score stands for the cost of its removal. It ranks experts of the same block; there are no costs of anything
smaller, and no updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_surgeon.curvature.estimator import Curvature, Estimator, WarmStart
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.expert_scores import EXPERT_SCORES, ExpertStatistics, extreme
from llm_surgeon.mathematics.fisher import Damping, Solver, Split
from llm_surgeon.mathematics.keep_masks import Axis, KeepMask
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.models.experts import Routed
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.parts import MixturePart
from llm_surgeon.passes.batch_major import Estimation, PassResult
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.task import Task

# Factor of the scores of experts that carry extreme activations: they go after all others.
_KEPT = 1e6


class RoutingEstimator(Estimator):
    """Scores of experts by one of ``EXPERT_SCORES``, from one pass without gradients."""

    backward = False
    stand_in = "activations"

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]  # one class for all names

    def estimate(self, task: Task, start: WarmStart | None) -> ExpertScores:
        """Scores of the experts of all blocks; see ``Estimator.estimate``."""
        parts = [part for part in task.anatomy.parts if isinstance(part, MixturePart)]
        layers = [name for part in parts for name in part.writers]
        sums = torch.zeros(4, len(layers), dtype=torch.float64)
        with Hooks() as hooks:
            for number, name in enumerate(layers):
                core = core_of(task.model, task.anatomy.layers[name])
                hooks.on_routed(core, "output", partial(_add, sums[:, number]))
            result = task.run(hooks, backward=False)
        task.processes.add_up([sums[:3]])
        task.processes.largest(sums[3])
        seen = ExpertStatistics(*sums)
        scores = EXPERT_SCORES[self.name](seen)
        scores = torch.where(extreme(seen.peaks), scores + _KEPT * scores.max(), scores) if layers else scores
        by_writer = dict(zip(layers, scores.tolist(), strict=True))
        experts = (expert for part in parts for expert in part.layers_of_experts())
        return ExpertScores({name: by_writer[expert[-1]] for expert in experts for name in expert}, result)

    def operations(self, layers: Iterable[LinearLayer], how: Estimation) -> float:
        """Operations per token of the norms: few beside the model's own."""
        return 0.0


def _add(sums: Tensor, output: Tensor, sent: Routed) -> None:
    """Add the outputs ``[n, width]`` of an expert to its sums ``[4]``, in place."""
    if len(output):
        norms = torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32)
        own = [float(len(output)), float(norms.sum()), float((norms * sent.shares).sum())]
        sums[:3] += torch.tensor(own, dtype=torch.float64)
        sums[3] = sums[3].clamp(min=float(output.abs().max()))


@dataclass(frozen=True)
class ExpertScores(Curvature):
    """Scores of experts.

    Attributes:
        scores: Score of the expert that a layer belongs to, by the layer's name.
        result: Counts and loss of the pass.
    """

    scores: Mapping[str, float]
    result: PassResult

    @property
    def loss(self) -> float | None:
        """Mean negative log-likelihood of the calibration tokens, in nats."""
        return self.result.loss

    @property
    def nbytes(self) -> int:
        """Bytes of the scores."""
        return 8 * len(self.scores)

    def fisher(self, layer: LinearLayer, keep: KeepMask, damping: Damping) -> ExpertCosts:
        """Costs of the expert that a layer belongs to."""
        return ExpertCosts(self.scores.get(layer.name, 0.0))


@dataclass(frozen=True)
class ExpertCosts:
    """Costs of one expert in place of a Fisher; recipes ask for nothing else (``recipe.methods.Curvature.structures``).

    Attributes:
        score: Cost of the whole expert.
    """

    score: float

    def set_costs(self, weight: Tensor, axis: Axis, sets: Tensor, valid: Tensor, *, correlated: bool) -> Tensor:
        """The expert's score, for each set: ``[n]``."""
        return weight.new_full((len(sets),), self.score, dtype=torch.float64)

    def element_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Refused."""
        raise self._refusal()

    def row_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Refused."""
        raise self._refusal()

    def column_costs(self, weight: Tensor, *, correlated: bool) -> Tensor:
        """Refused."""
        raise self._refusal()

    def remove_rows_and_columns(self, weight: Tensor, rows: Split, columns: Split, solver: Solver) -> Tensor:
        """Refused."""
        raise self._refusal()

    def remove_elements(self, weight: Tensor, kept: Tensor, solver: Solver) -> Tensor:
        """Refused."""
        raise self._refusal()

    def _refusal(self) -> ConfigError:
        return ConfigError("Scores of experts say nothing of smaller structures.", "Use --structure experts.")
