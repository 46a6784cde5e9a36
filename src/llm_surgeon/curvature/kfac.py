"""K-FAC with the empirical Fisher: the one owner of hooks.

For every prunable layer with inputs ``a`` and gradients ``g`` of the *summed* negative log-likelihood at its
outputs, ``A = mean a a^T`` and ``G = mean g g^T`` over the tokens that have a label (Martens & Grosse 2015; for
sequences the "expand" setting of Eschenhagen et al. 2023). Labels are the data's own next tokens. No weight needs a
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.curvature.factors import Curvature, InputSum
from llm_surgeon.curvature.gram import GramSum
from llm_surgeon.errors import NonFiniteError
from llm_surgeon.models.family import Anatomy, LinearLayer
from llm_surgeon.models.head import head_loss, label_positions
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.modes import arithmetic, frozen
from llm_surgeon.selection import KeepMask


class Tokens(Protocol):
    """What curvature needs of calibration tokens."""

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batches of ``input_ids`` and an attention mask or None."""
        ...


class _Collector:
    """Forward and backward hooks that add to the factors' sums; removes them on exit."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, keep: Mapping[str, KeepMask]) -> None:
        self.inputs: dict[str, InputSum] = {}
        self.gradients: dict[str, GramSum] = {}
        self.full_width: set[str] = set()
        self.positions: Tensor | None = None
        self._handles: list[Any] = []
        self._model = model
        groups: dict[str, list[LinearLayer]] = {}
        for layer in anatomy.layers.values():
            groups.setdefault(layer.input_group, []).append(layer)
        try:
            for group, readers in groups.items():
                self._watch_input(group, readers, keep)
            for layer in anatomy.layers.values():
                self._watch_gradient(layer, keep[layer.name])
            embedding = model.get_input_embeddings()
            # No parameter requires a gradient, so the graph has to start at the embedded tokens.
            self._handles.append(embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_()))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch_input(self, group: str, readers: list[LinearLayer], keep: Mapping[str, KeepMask]) -> None:
        """Watch a shared input where it is still whole, an input with one reader where only its columns are left."""
        first = readers[0]
        core = core_of(self._model, first)
        if len(readers) > 1:
            self.full_width.add(group)
            module, size = self._model.get_submodule(first.name), first.columns
        else:
            module, size = core, int(keep[first.name].columns.sum())
        total = InputSum(size, any(layer.bias for layer in readers), core.weight.device)
        self.inputs[group] = total

        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            total.add(self._labelled(arguments[0].detach()))

        self._handles.append(module.register_forward_pre_hook(hook))

    def _watch_gradient(self, layer: LinearLayer, keep: KeepMask) -> None:
        core = core_of(self._model, layer)
        total = GramSum(int(keep.rows.sum()), core.weight.device)
        self.gradients[layer.name] = total

        def hook(_module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: total.add(self._labelled(gradient)))

        self._handles.append(core.register_forward_hook(hook))

    def _labelled(self, x: Tensor) -> Tensor:
        """The rows of ``[batch, length, size]`` that have a label, ``[n, size]``."""
        x = x.flatten(0, -2)
        assert self.positions is not None
        return x if len(self.positions) == len(x) else x.index_select(0, self.positions)


def estimate(
    model: PreTrainedModel,
    anatomy: Anatomy,
    keep: Mapping[str, KeepMask],
    tokens: Tokens,
    *,
    batch_size: int,
    precision: str,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> Curvature:
    """One pass over the calibration tokens.

    Args:
        model: The model, as pruned so far.
        anatomy: Its prunable layers.
        keep: What is left of them; must agree with the model.
        tokens: Calibration tokens.
        batch_size: Sequences per pass.
        precision: ``bfloat16`` or ``float32`` arithmetic; sums are float32 in any case.
        advance: Called with the number of tokens after each batch.

    Raises:
        NonFiniteError: If the loss or a sum is not finite; names the layer.
    """
    device = next(model.parameters()).device
    loss, count = 0.0, 0
    with frozen(model), arithmetic(device, precision):
        collector = _Collector(model, anatomy, keep)
        try:
            for input_ids, attention_mask in tokens.batches(batch_size):
                input_ids = input_ids.to(device)
                attention_mask = None if attention_mask is None else attention_mask.to(device)
                positions, labels = label_positions(input_ids, attention_mask)
                collector.positions = positions
                loss += _backward(model, input_ids, attention_mask, positions, labels)
                count += len(positions)
                advance(input_ids.numel())
                _check_loss(loss)
        finally:
            collector.remove()
    return Curvature(collector.inputs, collector.gradients, count, frozenset(collector.full_width), loss / count)


def _backward(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, positions: Tensor, labels: Tensor
) -> float:
    """Forward and backward through the blocks; the hooks take what they need on the way. Returns the summed loss."""
    mask = None if attention_mask is None else attention_mask.long()
    hidden = model.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state
    flat = hidden.reshape(-1, hidden.shape[-1])
    last = flat.detach().index_select(0, positions)
    gradient = torch.empty_like(last)
    loss = head_loss(model, last, labels, gradient)
    whole = torch.zeros_like(flat).index_copy_(0, positions, gradient)
    torch.autograd.backward(flat, whole)
    return loss


def _check_loss(loss: float) -> None:
    if not math.isfinite(loss):
        raise NonFiniteError(
            "The loss on the calibration tokens is not finite: the activations of the model overflow.",
            "Run with --precision float32 and --dtype float32, or check the checkpoint's weights.",
        )
