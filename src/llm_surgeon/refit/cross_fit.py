"""Cross-fitting: each half of the calibration sequences makes a model of its own, and the result is their mean.

Reconstruction corrects many weights by few tokens, and so closely that these tokens say little of other text any more:
gates set by them correct errors that only they have. *Cross-fitting* avoids that. Each half of the sequences makes a
model of its own, reconstructed from the half and with gates that the other half sets, for which the model's errors are
those on any text. The mean of the weights of both models, which began as one and so have stayed near each other, has
less of the chance of either half, as the mean of two estimates does. Without gates it is that mean alone.
(Chernozhukov et al. 2018, "Double/debiased machine learning", call it so where the many parameters that are not asked
for are fitted to one half of the data, the few that are to the other, and the mean of both ways round is taken.)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.matrix import core_of
from llm_surgeon.recipe.config import HALVES
from llm_surgeon.records import Figure
from llm_surgeon.refit.last_norm import last_norm_parameters
from llm_surgeon.refit.stage import Fitted


class OtherWeights:
    """Weights of the model of the other half while that of one half is fitted."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, beside: Iterable[str] = ()) -> None:
        """Keep the weights as they are now.

        Args:
            model: The model.
            anatomy: Its prunable layers.
            beside: Names of parameters beside these layers and the last norm that stages change.
        """
        self._model, self._anatomy = model, anatomy
        self._beside = tuple(dict.fromkeys([*last_norm_parameters(model, anatomy), *beside]))
        self._kept = [tensor.clone() for tensor in self._changing()]

    def exchange(self) -> None:
        """Put the kept weights into the model, and keep those that were there."""
        for own, tensor in zip(self._changing(), self._kept, strict=True):
            former = own.clone()
            own.copy_(tensor)
            tensor.copy_(former)

    def take_mean(self) -> None:
        """Put the mean of the model's weights and the kept ones into the model."""
        for own, tensor in zip(self._changing(), self._kept, strict=True):
            own.copy_((own.float() + tensor.float()) / HALVES)

    def _changing(self) -> list[Tensor]:
        """The parameters that stages fit, or may fit."""
        modules = [core_of(self._model, layer) for layer in self._anatomy.layers.values()]
        parameters = [parameter for module in modules for parameter in module.parameters()]
        parameters += [self._model.get_parameter(name) for name in self._beside]
        return [parameter.data for parameter in parameters]


def half_of(tokens: CalibrationTokens, which: int | None, sequences: int) -> CalibrationTokens:
    """Every second sequence, with its copies; which ones does not depend on how processes share them.

    Args:
        tokens: Sequences of this process, all of them once or, with copies, several times.
        which: Whether to take those with even numbers among all processes, 0, or with odd ones, 1; None takes all.
        sequences: How many sequences this process has, copies not counted.
    """
    if which is None:
        return tokens
    rows = torch.arange(tokens.n_samples) % sequences
    chosen = (tokens.first + rows) % HALVES == which
    mask = None if tokens.attention_mask is None else tokens.attention_mask[chosen]
    return CalibrationTokens(tokens.input_ids[chosen], mask, tokens.provenance, tokens.first)


def mean_of(first: Fitted, second: Fitted) -> Fitted:
    """Figures of both halves: means, but for counts, which are those of either."""
    pairs = zip(first.figures, second.figures, strict=True)
    return Fitted(tuple(_mean(one, other) for one, other in pairs), first.note)


def _mean(one: Figure, other: Figure) -> Figure:
    if one.kind == "count" or one.value is None or other.value is None:
        return one
    return one.model_copy(update={"value": (one.value + other.value) / HALVES})
