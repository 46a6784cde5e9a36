"""Cross-fitting: each half of the calibration sequences makes a model of its own, and the result is their mean.

Reconstruction fits many weights to few tokens, so closely that these tokens say little of other text any more: gates
set by the same tokens correct errors that other text does not have. *Cross-fitting* avoids that. Each half of the
sequences makes a model of its own. The model is reconstructed from its half, and the other half sets its gates: to that
half, the model's errors are the errors on any text. The result has the mean of both models' weights. Both models began
as one and have stayed near each other, and the mean of two estimates depends less on the chance of either half. Without
gates, cross-fitting is this mean alone.
(The name is from Chernozhukov et al. 2018, "Double/debiased machine learning": there, many nuisance parameters are
fitted to one half of the data, the few parameters of interest to the other half, and the mean of both ways is taken.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.recipe.config import HALVES
from llm_surgeon.records import Figure
from llm_surgeon.refit.last_norm import last_norm_parameters
from llm_surgeon.refit.stage import Fitted
from llm_surgeon.system.allocator import forget_pages


def fitted_parameters(model: PreTrainedModel, anatomy: Anatomy, beside: Iterable[str] = ()) -> list[nn.Parameter]:
    """Parameters that stages may fit: the prunable layers, the last norm, and parameters that stages name.

    Args:
        model: The model.
        anatomy: Prunable layers of the model.
        beside: Names of parameters that stages change beside these layers and the last norm.
    """
    modules = [core_of(model, layer) for layer in anatomy.layers.values()]
    parameters = [parameter for module in modules for parameter in module.parameters()]
    names = dict.fromkeys([*last_norm_parameters(model, anatomy), *beside])
    return [*parameters, *(model.get_parameter(name) for name in names)]


class OtherWeights:
    """Weights of the other half's model while the model of one half is fitted."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, beside: Iterable[str] = ()) -> None:
        """Keep a copy of the weights as they are now.

        Args:
            model: The model.
            anatomy: Prunable layers of the model.
            beside: Names of parameters that stages change beside these layers and the last norm.
        """
        self._changing = partial(fitted_parameters, model, anatomy, tuple(beside))
        self._weights = weights_of(model)
        self._kept = [self._weights.kept(parameter) for parameter in self._changing()]

    @property
    def kept(self) -> Sequence[Tensor]:
        """The kept weights, in the order of ``fitted_parameters``."""
        return self._kept

    def exchange(self) -> None:
        """Exchange the kept weights with the model's."""
        for number, parameter in enumerate(self._changing()):
            former = self._weights.kept(parameter)
            self._weights.write(parameter, self._kept[number])
            self._kept[number] = former

    def take_mean(self) -> None:
        """Put the mean of the model's weights and the kept ones into the model."""
        for parameter, other in zip(self._changing(), self._kept, strict=True):
            self._weights.write(parameter, (parameter.data.float() + other.float()) / HALVES)
            forget_pages(other)


def half_of(tokens: CalibrationTokens, which: int | None, sequences: int) -> CalibrationTokens:
    """Every second sequence, with its copies. The choice does not depend on how processes share the sequences.

    Args:
        tokens: Sequences of this process, all of them once or, with copies, several times.
        which: Half to take: 0 for sequences with even numbers among all processes, 1 for odd numbers; None takes all.
        sequences: Number of sequences of this process, copies not counted.
    """
    if which is None:
        return tokens
    rows = torch.arange(tokens.n_samples) % sequences
    chosen = (tokens.first + rows) % HALVES == which
    mask = None if tokens.attention_mask is None else tokens.attention_mask[chosen]
    return CalibrationTokens(tokens.input_ids[chosen], mask, tokens.provenance, tokens.first)


def mean_of(first: Fitted, second: Fitted) -> Fitted:
    """Means of both halves' figures; counts are the same in both, and stay."""
    pairs = zip(first.figures, second.figures, strict=True)
    return Fitted(tuple(_mean(one, other) for one, other in pairs), first.note)


def _mean(one: Figure, other: Figure) -> Figure:
    if one.kind == "count" or one.value is None or other.value is None:
        return one
    return one.model_copy(update={"value": (one.value + other.value) / HALVES})
