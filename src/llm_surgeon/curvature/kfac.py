"""K-FAC: Kronecker factors from inputs and gradients taken for independent; without gradients, the inputs alone.

For every prunable layer with inputs ``a`` and gradients ``g`` at its outputs, ``A = mean a a^T`` and
``G = mean g g^T`` over the tokens that have a label (Martens & Grosse 2015; for sequences the "expand" setting of
Eschenhagen et al. 2023).
"""

from __future__ import annotations

from llm_surgeon.curvature.factors import InputSum, KroneckerFactors
from llm_surgeon.curvature.gram import GramSum
from llm_surgeon.curvature.hooks import Hooks
from llm_surgeon.curvature.passes import Task
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.models.matrix import core_of


def estimate_kfac(task: Task) -> KroneckerFactors:
    """The factors of all layers from one pass; gradients only if the curvature is ``kfac``."""
    inputs: dict[str, InputSum] = {}
    gradients: dict[str, GramSum] = {}
    backward = task.how.curvature == "kfac"
    groups: dict[str, list[LinearLayer]] = {}
    for layer in task.anatomy.layers.values():
        groups.setdefault(layer.input_group, []).append(layer)
    with Hooks() as hooks:
        for group, readers in groups.items():
            inputs[group] = _watch_input(task, hooks, readers)
        if backward:
            for name, layer in task.anatomy.layers.items():
                core = core_of(task.model, layer)
                gradients[name] = GramSum(core.out_features, core.weight.device)
                hooks.on_gradient(core, gradients[name].add)
        result = task.run(hooks, backward=backward)
    task.processes.add_up(part for item in inputs.values() for part in item.sums)
    task.processes.add_up(strip for gram in gradients.values() for strip in gram.strips)
    full_width = frozenset(group for group, readers in groups.items() if len(readers) > 1)
    return KroneckerFactors(inputs, gradients, full_width, result)


def _watch_input(task: Task, hooks: Hooks, readers: list[LinearLayer]) -> InputSum:
    """Watch a shared input where it is still whole, an input with one reader where only its columns are left."""
    first = readers[0]
    core = core_of(task.model, first)
    if len(readers) > 1:
        module, size = task.model.get_submodule(first.name), first.columns
    else:
        module, size = core, core.in_features
    total = InputSum(size, any(layer.bias for layer in readers), core.weight.device)
    hooks.on_input(module, total.add)
    return total
