"""K-FAC: Kronecker factors of inputs and gradients, which are taken for independent; also factors of inputs alone.

For every prunable layer with inputs ``a`` and gradients ``g`` at its outputs, ``A = mean a a^T`` and
``G = mean g g^T`` over the tokens that have a label (Martens & Grosse 2015; for sequences the "expand" setting of
Eschenhagen et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterable

from llm_surgeon.curvature.estimator import Estimator, WarmStart
from llm_surgeon.curvature.factors import InputSum, KroneckerFactors
from llm_surgeon.curvature.gram import GramSum, reserve
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.models.matrix import core_of
from llm_surgeon.passes.batch_major import Estimation
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.task import Task


class KfacEstimator(Estimator):
    """K-FAC: ``G (x) A`` of inputs and gradients, which are taken for independent."""

    name = "kfac"
    puts_away = True

    def estimate(self, task: Task, start: WarmStart | None) -> KroneckerFactors:
        """Factors of all layers from one pass; see ``Estimator.estimate``."""
        return _estimate(task, self.backward)

    def operations(self, layers: Iterable[LinearLayer], how: Estimation) -> float:
        """Operations per token: half of each symmetric product of inputs and, if any, of gradients."""
        layers = list(layers)
        inputs = sum(size**2 for size in {layer.input_group: layer.columns for layer in layers}.values())
        gradients = sum(layer.rows**2 for layer in layers) if self.backward else 0
        return inputs + how.gradient_share * gradients


class InputEstimator(KfacEstimator):
    """Second moments of the inputs alone, ``I (x) A``."""

    name = "activations"
    backward = False


class IdentityEstimator(Estimator):
    """The identity: no tokens are read."""

    name = "identity"
    backward = False
    stand_in = "activations"

    def estimate(self, task: Task, start: WarmStart | None) -> KroneckerFactors:
        """Identity factors of all layers."""
        return KroneckerFactors({}, {}, frozenset(), None)

    def passes(self, how: Estimation, warm: bool) -> int:
        """Number of passes: none."""
        return 0

    def operations(self, layers: Iterable[LinearLayer], how: Estimation) -> float:
        """Operations per token: none."""
        return 0.0


def _estimate(task: Task, backward: bool) -> KroneckerFactors:
    """Factors of all layers from one pass, with gradients or without."""
    inputs: dict[str, InputSum] = {}
    gradients: dict[str, GramSum] = {}
    groups: dict[str, list[LinearLayer]] = {}
    for layer in task.anatomy.layers.values():
        groups.setdefault(layer.input_group, []).append(layer)
    with Hooks() as hooks:
        for group, readers in groups.items():
            inputs[group] = _watch_input(task, hooks, readers)
        if backward:
            for name, layer in task.anatomy.layers.items():
                core = core_of(task.model, layer)
                gradients[name] = GramSum(core.out_features, task.device)
                hooks.on_gradient(core, gradients[name].add)

        if task.how.order == "batch-major":
            reserve([*(total.gram for total in inputs.values()), *gradients.values()], task.device)

        def put_away(block: int) -> None:
            layers = [layer for layer in task.anatomy.layers.values() if layer.block == block]
            own = dict.fromkeys(layer.input_group for layer in layers)
            for total in [inputs[group] for group in own] + [gradients[x.name] for x in layers if backward]:
                total.add_up(task.processes)
                total.put_away(task.store)

        result = task.run(hooks, backward=backward, finished=put_away)
    full_width = frozenset(group for group, readers in groups.items() if len(readers) > 1)
    return KroneckerFactors(inputs, gradients, full_width, result, task.keep)


def _watch_input(task: Task, hooks: Hooks, readers: list[LinearLayer]) -> InputSum:
    """Sum the input of some layers: a shared input at its full width, the input of one layer over its kept columns."""
    first = readers[0]
    core = core_of(task.model, first)
    if len(readers) > 1:
        module, size = task.model.get_submodule(first.name), first.columns
    else:
        module, size = core, core.in_features
    total = InputSum(size, any(layer.bias for layer in readers), task.device)
    hooks.on_input(module, total.add)
    return total
