"""The socket for approximations of the curvature: an estimator, and the curvature that it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.mathematics.fisher import Damping, Fisher
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy, LinearLayer
from llm_surgeon.passes.batch_major import Estimation, PassResult
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.task import Task
from llm_surgeon.session.session import Session


@dataclass(frozen=True)
class WarmStart:
    """Factors from which the power iteration of the next shot starts, cut down to the columns that are left.

    Attributes:
        inputs: Factor A of each term over the kept columns and, last, the bias, by layer.
    """

    inputs: Mapping[str, Sequence[Tensor]]


class Curvature(ABC):
    """The curvature of all layers after an estimation."""

    @property
    @abstractmethod
    def loss(self) -> float | None:
        """Mean negative log-likelihood of the calibration tokens in nats; None if they were not read."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the factors, wherever they are."""

    @abstractmethod
    def fisher(self, layer: LinearLayer, keep: KeepMask, damping: Damping) -> Fisher:
        """Fisher of one layer over its kept rows and columns and, last, its bias."""

    def warm_start(self, layers: Mapping[str, LinearLayer], keep: Mapping[str, KeepMask]) -> WarmStart | None:
        """Factors from which the next shot starts, where only ``keep`` is left; None if it starts afresh."""
        return None


class Estimator(ABC):
    """One approximation of the curvature.

    A new estimator needs a name, ``estimate``, and rows in ``estimators.ESTIMATORS`` and ``recipe.methods.CURVATURES``.
    ``estimators.register_estimator`` adds both rows. Everything else has a default.

    Attributes:
        name: Name in the recipe.
        backward: Whether the passes take gradients.
        puts_away: Whether a layer-major pass puts the sums into the store block by block.
        stand_in: Name of the estimator whose measured memory, beside the factors, counts for this one too; None for
            its own.
    """

    name: ClassVar[str]
    backward: ClassVar[bool] = True
    puts_away: ClassVar[bool] = False
    stand_in: ClassVar[str | None] = None

    @abstractmethod
    def estimate(self, task: Task, start: WarmStart | None) -> Curvature:
        """Estimate the curvature of every prunable layer.

        Args:
            task: The model as it is, the tokens, and how to read them.
            start: Factors of the last shot; None if there are none.

        Raises:
            NonFiniteError: If the loss is not finite.
            ProcessError: If another process is gone.
        """

    def passes(self, how: Estimation, warm: bool) -> int:
        """Number of passes over the tokens that an estimation takes, with or without a warm start."""
        return 1

    def factor_bytes(self, network: PreTrainedModel, anatomy: Anatomy, how: Estimation) -> int:
        """Bytes of the factors of the dense model's layers while they are estimated, at most.

        Args:
            network: The model, on the meta device for example.
            anatomy: Prunable layers of the model.
            how: The estimation.
        """
        tokens = CalibrationTokens(torch.zeros(1, 1, dtype=torch.int64), None, {})
        return self.estimate(_Idle(Session(network, anatomy, tokens), {}, how), None).nbytes

    def start_bytes(self, layers: Iterable[LinearLayer]) -> int:
        """Bytes of the warm start for the next shot, at most; 0 if each shot starts afresh."""
        return 0

    def operations(self, layers: Iterable[LinearLayer], how: Estimation) -> float:
        """Floating-point operations per token of the sums over tokens, beside the operations of the model."""
        return sum(2.0 * layer.rows * layer.columns for layer in layers)


class _Idle(Task):
    """A task whose pass reads no tokens, so that an estimator's sums keep the size that they have before the pass."""

    def run(self, hooks: Hooks, *, backward: bool, finished: Callable[[int], None] = lambda _block: None) -> PassResult:
        """Count one token without reading any."""
        return PassResult(0.0, 1, 1)
