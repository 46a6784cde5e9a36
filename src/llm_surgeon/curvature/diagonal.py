"""The exact diagonal of the Fisher: ``D_rc = mean g_r^2 a_c^2`` over the tokens, without any independence assumed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_surgeon.curvature.estimator import Curvature, Estimator, WarmStart
from llm_surgeon.mathematics.fisher import Damping, Diagonal
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import LinearLayer
from llm_surgeon.models.matrix import core_of
from llm_surgeon.passes.batch_major import PassResult
from llm_surgeon.passes.hooks import Hooks, with_bias
from llm_surgeon.passes.task import Task
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.storage import Stored, TensorStore


class _SquareSum:
    """The sum over tokens of the squared gradient of each weight, ``[R, C]`` float32.

    Memory is taken with the first addition, or earlier by ``begin``.
    """

    def __init__(self, rows: int, columns: int, bias: bool, device: torch.device) -> None:
        self._shape = rows, columns + bias
        self._bias, self._device = bias, device
        self._total: Tensor | None = None
        self._stored: Stored | None = None

    def begin(self) -> Tensor:
        """The sum so far ``[R, C]``, allocated as zeros if there is none yet."""
        if self._total is None:
            self._total = torch.zeros(self._shape, dtype=torch.float32, device=self._device)
        return self._total

    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add ``inputs [tokens, C]`` and ``gradients [tokens, R]``."""
        self.begin().addmm_(gradients.float().square().T, with_bias(inputs, self._bias).float().square())

    def put_away(self, processes: Processes, store: TensorStore) -> None:
        """Add the sums of the other processes, and put the total into a store."""
        total, self._total = self.begin(), None
        processes.add_up([total])
        self._stored = store.put(total)

    def mean(self, count: int) -> Tensor:
        """Mean over ``count`` gradients, ``[R, C]``; the sum has to be put away before."""
        assert self._stored is not None, "it has not been put away"
        return self._stored.get() / count

    @property
    def nbytes(self) -> int:
        """Bytes of the sum, wherever it is."""
        return 4 * self._shape[0] * self._shape[1]


class DiagonalCurvature(Curvature):
    """The diagonals of all layers after one pass."""

    def __init__(self, sums: Mapping[str, _SquareSum], result: PassResult) -> None:
        self._sums = sums
        self._count = result.tokens * result.gradients_per_token
        self._loss = result.loss

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the calibration tokens, in nats."""
        return self._loss

    def fisher(self, layer: LinearLayer, keep: KeepMask, damping: Damping) -> Diagonal:
        """Fisher of a layer's kept rows and columns. The diagonal is not inverted, so ``damping`` has no effect."""
        return Diagonal(self._sums[layer.name].mean(self._count))

    @property
    def nbytes(self) -> int:
        """Bytes held by the sums."""
        return sum(item.nbytes for item in self._sums.values())


class DiagonalEstimator(Estimator):
    """The exact diagonal of the Fisher."""

    name = "diagonal"
    puts_away = True

    def estimate(self, task: Task, start: WarmStart | None) -> DiagonalCurvature:
        """Diagonals of all layers from one pass; see ``Estimator.estimate``."""
        sums: dict[str, _SquareSum] = {}

        def put_away(block: int) -> None:
            for name, layer in task.anatomy.layers.items():
                if layer.block == block:
                    sums[name].put_away(task.processes, task.store)

        with Hooks() as hooks:
            for name, layer in task.anatomy.layers.items():
                core = core_of(task.model, layer)
                sums[name] = _SquareSum(core.out_features, core.in_features, layer.bias, task.device)
                hooks.on_pair(core, sums[name].add)
            if task.how.order == "batch-major":
                # The sums live longer than the tensors of the pass, so they are allocated before these.
                for total in sums.values():
                    total.begin()
            result = task.run(hooks, backward=True, finished=put_away)
        return DiagonalCurvature(sums, result)
