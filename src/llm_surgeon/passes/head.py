"""The language-model head: labels, summed negative log-likelihood and its gradient, with few logits at a time."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.errors import NonFiniteError

# Tokens whose logits exist at once: a vocabulary of 50,000 in bfloat16 makes 50 MB of logits. With fewer tokens the
# head's weights are read too often.
CHUNK = 512
# Logits that are worked on at once in float32: on a CPU as many as stay in its cache, elsewhere some megabytes.
_AT_ONCE_CPU, AT_ONCE = 2**20, 2**22


def label_positions(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Flat positions that have a next token to predict, and these next tokens as labels.

    Args:
        input_ids: ``[batch, length]``.
        attention_mask: ``[batch, length]``, True for real tokens, or None if all are.

    Returns:
        Positions in the flattened batch ``[n]`` and their labels ``[n]``. The last position of a sequence and
        positions at or before padding have no label.
    """
    labelled = torch.ones_like(input_ids, dtype=torch.bool)
    labelled[:, -1] = False
    if attention_mask is not None:
        real = attention_mask.bool()
        labelled[:, :-1] = real[:, :-1] & real[:, 1:]
    positions = labelled.flatten().nonzero().flatten()
    return positions, input_ids.flatten()[positions + 1]


class Head:
    """Head of a model, which turns last hidden states ``[n, width]`` into logits ``[n, vocabulary]`` in float32.

    It is the output embedding, and with some families a factor (Granite, Cohere) and a cap (Gemma 2) on the logits.

    Args:
        model: A causal language model.
        own_copy: Whether the weights are copied, so that later changes of the model do not matter.
    """

    def __init__(self, model: PreTrainedModel, own_copy: bool = False) -> None:
        head = model.get_output_embeddings()
        self._linear = deepcopy(head) if own_copy else head
        # Read where the class reads them: those whose language model is one tower (Gemma 3) neither scale nor cap.
        settings = model.config
        self._cap = getattr(settings, "final_logit_softcapping", None)
        self._factor = _factor(settings)

    def __call__(self, states: Tensor) -> Tensor:
        """Logits ``[n, vocabulary]`` of states ``[n, width]``, float32."""
        return self._capped(self._linear(states))

    def few(self, states: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield logits as a call makes them, a few rows at a time, with these rows of other tensors ``[n, ...]``."""
        for some, *others in few_rows(self._linear(states), *beside):
            yield self._capped(some), *others

    def _capped(self, logits: Tensor) -> Tensor:
        values = logits.float()
        if self._factor != 1.0:
            values = values * self._factor
        return values if self._cap is None else self._cap * torch.tanh(values / self._cap)

    def likelihood(self, states: Tensor, labels: Tensor, gradient: Tensor | None = None) -> float:
        """Sum of the negative log-likelihoods of labels in nats, and if asked its gradient at the states.

        The gradient at the logits is ``softmax(logits) - onehot(labels)``. It is written down here, because automatic
        differentiation holds three times as many numbers of the size of the logits. Here the gradient overwrites the
        logits, a few rows at a time.

        Args:
            states: ``[n, width]``.
            labels: ``[n]``.
            gradient: ``[n, width]``, filled with the gradient; None computes none.
        """
        logits = self._linear(states)
        # Elsewhere than on a CPU, the sum of each few would be waited for.
        parts = few_rows(logits, labels) if logits.device.type == "cpu" else [(logits, labels)]
        total = sum(self._likelihood_of(some, own, gradient is not None) for some, own in parts)
        if gradient is not None:
            weight = self._linear.weight
            gradient.copy_(logits.to(weight.dtype) @ weight)
        return total

    def _likelihood_of(self, logits: Tensor, labels: Tensor, into_gradient: bool) -> float:
        """Summed negative log-likelihood from uncapped logits ``[n, vocabulary]``; its gradient may overwrite these."""
        values, label = self._capped(logits), labels[:, None]
        # With a factor f and a cap, ``l = c tanh(f z / c)``, so that ``dl/dz = f (1 - (l / c)^2)``.
        slope = None if self._cap is None or not into_gradient else 1 - (values / self._cap).square_()
        if self._factor != 1.0 and into_gradient:
            slope = values.new_tensor(self._factor) if slope is None else slope.mul_(self._factor)
        log_probabilities = values.log_softmax(-1)
        total = -float(log_probabilities.gather(1, label).sum())
        if into_gradient:
            by_logits = log_probabilities.exp_()
            by_logits.scatter_add_(1, label, by_logits.new_full(label.shape, -1.0))
            logits.copy_(by_logits if slope is None else by_logits.mul_(slope))
        return total

    def sharpness(self, states: Tensor, labels: Tensor) -> tuple[float, float]:
        """First and second derivative of ``likelihood`` by a scale ``s`` of the states, at 1.

        With logits ``s u`` plus a bias and their probabilities ``p``: the sums of ``E_p[u] - u_label`` and of
        ``Var_p[u]`` over the positions. A cap on the logits is not provided for.
        """
        bias, sums = self._linear.bias, states.new_zeros(2, dtype=torch.float32)
        for logits, own in self.few(states, labels):
            scaled = logits if bias is None else logits - self._factor * bias.float()
            probabilities = logits.softmax(-1)
            mean = (probabilities * scaled).sum(-1, keepdim=True)
            slope = mean - scaled.gather(1, own[:, None])
            # The variance is not taken as a difference of two squares, which may be large beside it.
            variance = (probabilities * (scaled - mean).square_()).sum()
            sums += torch.stack([slope.sum(), variance])
        return float(sums[0]), float(sums[1])


def few_rows(logits: Tensor, *beside: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """A few rows of logits ``[n, vocabulary]`` at a time, and those of other tensors ``[n, ...]`` beside them."""
    rows = max(1, (_AT_ONCE_CPU if logits.device.type == "cpu" else AT_ONCE) // logits.shape[1])
    return zip(*(tensor.split(rows) for tensor in (logits, *beside)), strict=True)


def _factor(settings: Any) -> float:
    """Factor of the logits: Cohere multiplies them by an entry of the configuration, Granite divides them by one."""
    times, over = (getattr(settings, name, None) for name in ("logit_scale", "logits_scaling"))
    return float(times if times is not None else 1.0) / float(over if over is not None else 1.0)


@torch.no_grad()
def head_loss(model: PreTrainedModel, hidden: Tensor, labels: Tensor, gradient: Tensor | None = None) -> float:
    """Sum of the negative log-likelihoods of some positions, and if asked its gradient at their last hidden states.

    Args:
        model: A causal language model whose logits ``Head`` makes of its last hidden states.
        hidden: ``[n, width]`` last hidden states.
        labels: ``[n]`` next tokens.
        gradient: ``[n, width]``, filled with the gradient; None computes none.

    Returns:
        The sum in nats.
    """
    head, total = Head(model), 0.0
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        total += head.likelihood(hidden[part], labels[part], None if gradient is None else gradient[part])
    return total


@torch.no_grad()
def head_sharpness(model: PreTrainedModel, hidden: Tensor, labels: Tensor) -> tuple[float, float]:
    """Derivatives of the loss by the scale of the logits, as ``Head.sharpness`` gives them, a few positions at a time.

    Args:
        model: A causal language model, see ``head_loss``.
        hidden: ``[n, width]`` last hidden states.
        labels: ``[n]`` next tokens.
    """
    head = Head(model)
    parts = [head.sharpness(*part) for part in zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)]
    return sum(slope for slope, _ in parts), sum(curvature for _, curvature in parts)


def last_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Last hidden states of ``input_ids [batch, length]``, flat as ``label_positions`` counts them.

    Args:
        model: A causal language model, see ``head_loss``.
        input_ids: ``[batch, length]``.
        attention_mask: ``[batch, length]``, True for real tokens, or None if all are.

    Returns:
        ``[batch * length, width]``.
    """
    mask = None if attention_mask is None else attention_mask.long()
    hidden: Tensor = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    return hidden.reshape(-1, hidden.shape[-1])


def backward(
    model: PreTrainedModel, states: Tensor, positions: Tensor, labels: Tensor, keep_graph: bool = False
) -> float:
    """Back-propagate the sum of the negative log-likelihoods from the last hidden states to all that they depend on.

    Args:
        model: A causal language model, see ``head_loss``.
        states: ``[batch * length, width]`` last hidden states with their graph.
        positions: ``[n]``, flat positions that have a label.
        labels: ``[n]`` next tokens.
        keep_graph: Whether the graph is needed once more.

    Returns:
        The sum in nats.
    """
    last = states.detach().index_select(0, positions)
    gradient = torch.empty_like(last)
    loss = head_loss(model, last, labels, gradient)
    whole = torch.zeros_like(states).index_copy_(0, positions, gradient)
    torch.autograd.backward(states, whole, retain_graph=keep_graph)
    return loss


@torch.no_grad()
def sample_labels(model: PreTrainedModel, hidden: Tensor, draws: Tensor) -> Tensor:
    """Draw next tokens from the model's own prediction, by inversion of its distribution function.

    Args:
        model: A causal language model, see ``head_loss``.
        hidden: ``[n, width]`` last hidden states.
        draws: ``[n, samples]`` numbers uniform in [0, 1), on the device of ``hidden``.

    Returns:
        ``[samples, n]``.

    Raises:
        NonFiniteError: If a prediction is not finite.
    """
    head, finite = Head(model), torch.ones((), dtype=torch.bool, device=hidden.device)
    parts = []
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        for some, drawn in head.few(hidden[part], draws[part]):
            cumulative = some.softmax(-1).cumsum_(-1)
            finite &= cumulative[:, -1].isfinite().all()
            # Rounded, the sum is not quite 1.
            labels = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
            parts.append(labels.clamp_(max=cumulative.shape[-1] - 1))
    if not bool(finite):
        raise NonFiniteError(
            "The model's predictions for the calibration tokens are not finite.",
            "Run with --precision float32 and --dtype float32, or check the checkpoint's weights.",
        )
    return torch.cat(parts).T
