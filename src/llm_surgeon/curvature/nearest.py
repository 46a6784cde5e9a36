"""The nearest Kronecker product, or sum of two, to the Fisher of each layer (paper, appendix I, Alg. 4).

Each half step of the power iteration is one pass over the data, as the inputs and gradients of all tokens would not fit
into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.curvature.estimator import Curvature, Estimator, WarmStart
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.fisher import Damping, Fisher, KroneckerProduct, SumOfTwo
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.mathematics.kronecker_sum import kronecker_sum_bytes
from llm_surgeon.mathematics.nearest_kronecker import (
    Pair,
    balanced_pair,
    finished_half_step,
    gradient_half_step,
    input_half_step,
)
from llm_surgeon.models.anatomy import Anatomy, LinearLayer, to_index
from llm_surgeon.models.matrix import core_of
from llm_surgeon.passes.batch_major import Estimation, PassResult
from llm_surgeon.passes.hooks import Hooks, with_bias
from llm_surgeon.passes.task import Task
from llm_surgeon.system.memory import available_bytes

HalfStep = Callable[[Tensor, Tensor, Tensor], Tensor]

TERMS = {"nearest-kronecker": 1, "kronecker-sum": 2}


@dataclass(frozen=True)
class NearestCurvature(Curvature):
    """One or two Kronecker products per layer.

    Attributes:
        terms: Pairs ``(G, A)`` over the kept rows and columns and, last, the bias, by layer.
        keep: Masks of the layers when the pairs were estimated.
        result: Counts and loss of the last pass.
    """

    terms: Mapping[str, list[Pair]]
    keep: Mapping[str, KeepMask]
    result: PassResult

    @property
    def loss(self) -> float | None:
        """Mean negative log-likelihood of the calibration tokens, in nats."""
        return self.result.loss

    def fisher(self, layer: LinearLayer, keep: KeepMask, damping: Damping) -> Fisher:
        """Fisher of one layer over its kept rows and columns and, last, its bias."""
        first, *rest = self.terms[layer.name]
        if rest:
            return SumOfTwo(first, rest[0], damping, layer.name)
        return KroneckerProduct(*first, damping, layer.name)

    @property
    def nbytes(self) -> int:
        """Bytes held by the factors."""
        return sum(factor.nbytes for pairs in self.terms.values() for pair in pairs for factor in pair)

    def warm_start(self, layers: Mapping[str, LinearLayer], keep: Mapping[str, KeepMask]) -> WarmStart:
        """Factors from which the next shot starts, where only ``keep`` is left."""
        return WarmStart({name: self._inputs_left(layer, keep[name]) for name, layer in layers.items()})

    def _inputs_left(self, layer: LinearLayer, keep: KeepMask) -> list[Tensor]:
        columns = to_index(keep.columns[self.keep[layer.name].columns])
        if layer.bias:
            columns = torch.cat([columns, columns.new_tensor([len(self.terms[layer.name][0][1]) - 1])])
        return [a[columns][:, columns].contiguous() for _, a in self.terms[layer.name]]


class NearestEstimator(Estimator):
    """The Kronecker product nearest to the Fisher."""

    name = "nearest-kronecker"
    # A half step takes the same pairs of inputs and gradients as the exact diagonal.
    stand_in = "diagonal"

    def estimate(self, task: Task, start: WarmStart | None) -> NearestCurvature:
        """Products of all layers by power iteration; see ``Estimator.estimate``.

        Raises:
            ConfigError: If the factors and their decomposition would not fit into memory.
        """
        return estimate_nearest(task, start)

    def passes(self, how: Estimation, warm: bool) -> int:
        """Number of passes: two for each power iteration of each term."""
        return 2 * TERMS[self.name] * _iterations(how, warm)

    def factor_bytes(self, network: PreTrainedModel, anatomy: Anatomy, how: Estimation) -> int:
        """Bytes of all terms and of the partial sums, at most."""
        sizes = [(layer.rows, layer.columns, layer.bias) for layer in anatomy.layers.values()]
        return nearest_bytes(sizes, TERMS[self.name])

    def start_bytes(self, layers: Iterable[LinearLayer]) -> int:
        """Bytes of the factors A of all terms; see ``Estimator.start_bytes``."""
        return sum(4 * TERMS[self.name] * (layer.columns + layer.bias) ** 2 for layer in layers)


class KroneckerSumEstimator(NearestEstimator):
    """The nearest sum of two Kronecker products."""

    name = "kronecker-sum"


def _iterations(how: Estimation, warm: bool) -> int:
    # The factors of the last shot are nearly the answer (paper, Alg. 4).
    return 1 if warm else how.iterations


def estimate_nearest(task: Task, previous: WarmStart | None) -> NearestCurvature:
    """Find one term after the other by power iteration, each on the remainder that the terms before it leave.

    Args:
        task: The model as it is, the tokens, and how to read them.
        previous: Factors of the last shot, from which the iteration starts; None if there are none.

    Raises:
        ConfigError: If the factors and their decomposition would not fit into memory, with the bytes that they need.
    """
    layers, how = task.anatomy.layers, task.how
    check_affordable(task)
    terms: dict[str, list[Pair]] = {name: [] for name in layers}
    for term in range(TERMS[how.curvature]):
        inputs = {name: _start(task, layer, previous, term) for name, layer in layers.items()}
        for _ in range(_iterations(how, previous is not None)):
            totals, result = _half_step(task, gradient_half_step, inputs)
            count = result.tokens * result.gradients_per_token
            gradients = {name: finished_half_step(totals[name], count, inputs[name], terms[name])[0] for name in terms}
            totals, result = _half_step(task, input_half_step, gradients)
            finished = {
                name: finished_half_step(totals[name], count, gradients[name], [(a, g) for g, a in terms[name]])
                for name in terms
            }
            inputs = {name: factor for name, (factor, _) in finished.items()}
        for name, (factor, sigma) in finished.items():
            terms[name].append(balanced_pair(gradients[name], factor, sigma))
    return NearestCurvature(terms, dict(task.keep), result)


def _half_step(task: Task, step: HalfStep, opposite: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], PassResult]:
    """Sums over all tokens of a half step, for every layer."""
    totals: dict[str, Tensor] = {}
    with Hooks() as hooks:
        for name, layer in task.anatomy.layers.items():
            hooks.on_pair(core_of(task.model, layer), _adder(step, layer, opposite[name], totals))
        result = task.run(hooks, backward=True)
    # All processes have to add in the same order; the dictionary has the order in which the gradients came.
    task.processes.add_up(totals[name] for name in task.anatomy.layers)
    return totals, result


def _adder(
    step: HalfStep, layer: LinearLayer, opposite: Tensor, totals: dict[str, Tensor]
) -> Callable[[Tensor, Tensor], None]:
    def add(inputs: Tensor, gradients: Tensor) -> None:
        # Autocast would round the sums and so make them indefinite.
        with torch.autocast(inputs.device.type, enabled=False):
            part = step(with_bias(inputs, layer.bias), gradients, opposite)
        totals[layer.name] = totals[layer.name].add_(part) if layer.name in totals else part

    return add


def _start(task: Task, layer: LinearLayer, previous: WarmStart | None, term: int) -> Tensor:
    if previous is not None:
        return previous.inputs[layer.name][term]
    core = core_of(task.model, layer)
    return torch.eye(core.in_features + layer.bias, device=task.device)


def nearest_bytes(sizes: Iterable[tuple[int, int, bool]], terms: int) -> int:
    """Bytes of the factors while they are estimated, at most.

    Args:
        sizes: Rows, columns, and whether there is a bias, for each layer.
        terms: Number of products per layer.
    """
    # Beside the finished terms: the term that is being summed, and the part of a batch.
    return sum((terms + 2) * (rows**2 + (columns + bias) ** 2) * 4 for rows, columns, bias in sizes)


def check_affordable(task: Task) -> None:
    """Refuse, before any work, an estimation that would not fit into memory.

    Raises:
        ConfigError: If the factors would not fit, with the estimate in GiB.
    """
    device, terms = task.device, TERMS[task.how.curvature]
    sizes = [(*task.keep[name].shape, layer.bias) for name, layer in task.anatomy.layers.items()]
    held = nearest_bytes(sizes, terms)
    if terms > 1:
        held += max(kronecker_sum_bytes(rows, columns + bias, 4) for rows, columns, bias in sizes)
    free = available_bytes(device)
    if held > free:
        raise ConfigError(
            f"Nearest Kronecker products of {terms} term(s) for {len(sizes)} layers need about {held / 2**30:.1f} GiB "
            f"on {device}, where {free / 2**30:.1f} GiB are free.",
            "Use --curvature kfac, which shares factors between layers, or leave large layers out with --ignore.",
        )
