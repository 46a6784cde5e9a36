"""The exact diagonal of the Fisher: ``D_rc = mean g_r^2 a_c^2`` over the tokens, nothing taken for independent."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_surgeon.curvature.hooks import Hooks, with_bias
from llm_surgeon.curvature.passes import PassResult
from llm_surgeon.curvature.task import Task
from llm_surgeon.fisher import Damping, Diagonal
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.models.matrix import core_of
from llm_surgeon.selection import KeepMask


class _SquareSum:
    """The sum over tokens of the squared gradient of each weight, ``[R, C]`` float32."""

    def __init__(self, rows: int, columns: int, bias: bool, device: torch.device) -> None:
        self.total = torch.zeros(rows, columns + bias, dtype=torch.float32, device=device)
        self._bias = bias

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add ``inputs [tokens, C]`` and ``gradients [tokens, R]``."""
        self.total.addmm_(gradients.float().square().T, with_bias(inputs, self._bias).float().square())


class DiagonalCurvature:
    """The diagonals of all layers after one pass."""

    def __init__(self, sums: Mapping[str, _SquareSum], result: PassResult) -> None:
        self._sums = sums
        self._count = result.tokens * result.gradients_per_token
        self.loss = result.loss

    def fisher(self, layer: LinearLayer, keep: KeepMask, damping: Damping) -> Diagonal:
        """The Fisher of a layer's kept rows and columns; a diagonal is not inverted, so it needs no damping."""
        return Diagonal(self._sums[layer.name].total / self._count)

    @property
    def nbytes(self) -> int:
        """Bytes held by the sums."""
        return sum(item.total.nbytes for item in self._sums.values())


def estimate_diagonal(task: Task) -> DiagonalCurvature:
    """The exact diagonal for every layer from one pass."""
    sums = {}
    with Hooks() as hooks:
        for name, layer in task.anatomy.layers.items():
            core = core_of(task.model, layer)
            sums[name] = _SquareSum(core.out_features, core.in_features, layer.bias, task.device)
            hooks.on_pair(core, sums[name].add)
        result = task.run(hooks, backward=True)
    task.processes.add_up(item.total for item in sums.values())
    return DiagonalCurvature(sums, result)
