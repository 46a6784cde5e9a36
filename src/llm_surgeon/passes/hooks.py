"""Hooks on a model: they hand over a layer's inputs, outputs and gradients. No other module sets hooks for passes."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llm_surgeon.models.experts import Routed, routed, routed_tokens
from llm_surgeon.passes.draws import TokenSample

Receive = Callable[[Tensor], None]
Side = Literal["input", "output"]
# Takes rows of an expert's layer, and their tokens, counted among those that are handed over of other layers.
RoutedReceive = Callable[[Tensor, Routed], None]
PairReceive = Callable[[Tensor, Tensor], None]


class Hooks:
    """Hooks that hand over only the tokens that count; removed on exit.

    Attributes:
        positions: Flat positions of the tokens that count in the batch under way: those with a label where gradients
            are taken, else those that are no padding. While this is None, nothing is handed over.
        sample: Sample of these tokens whose gradients ``on_gradient`` hands over, with their weights; None takes all of
            them.
    """

    def __init__(self) -> None:
        self.positions: Tensor | None = None
        self.sample: TokenSample | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Hooks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def on_input(self, module: nn.Module, receive: Receive) -> None:
        """Hand over each input ``[tokens, columns]`` of a module."""

        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            if self.positions is not None:
                receive(self._counted(arguments[0].detach(), routed_tokens(module)))

        self._handles.append(module.register_forward_pre_hook(hook))

    def on_output(self, module: nn.Module, receive: Receive) -> None:
        """Hand over each output ``[tokens, rows]`` of a module."""

        def hook(module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if self.positions is not None:
                receive(self._counted(output.detach(), routed_tokens(module)))

        self._handles.append(module.register_forward_hook(hook))

    def on_gradient(self, module: nn.Module, receive: Receive) -> None:
        """Hand over each gradient ``[tokens, rows]`` of the summed loss at a module's output, for the sample if any."""

        def hook(module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and self.positions is not None:
                tokens = routed_tokens(module)
                take = self._counted if self.sample is None else self.sample.take
                output.register_hook(lambda gradient: receive(take(gradient, tokens)))

        self._handles.append(module.register_forward_hook(hook))

    def on_pair(self, module: nn.Module, receive: PairReceive) -> None:
        """Hand over input ``[tokens, columns]`` and gradient ``[tokens, rows]`` of the same tokens together."""

        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad and self.positions is not None:
                tokens = routed_tokens(module)
                # Tokens are selected when the gradient comes: until then the graph may hold the inputs anyway, while a
                # copy would take memory of its own.
                inputs = arguments[0].detach()
                output.register_hook(
                    lambda gradient: receive(self._counted(inputs, tokens), self._counted(gradient, tokens))
                )

        self._handles.append(module.register_forward_hook(hook))

    def on_effect(self, module: nn.Module, side: Side, receive: PairReceive) -> None:
        """Hand over the input or output of a module ``[tokens, size]`` with its gradient, for the same tokens.

        They have rows for all tokens that count, of zeros for those that the module is not run on.
        """

        def watch(module: nn.Module, value: Tensor) -> None:
            if value.requires_grad and self.positions is not None:
                held, tokens = value.detach(), routed_tokens(module)
                value.register_hook(
                    lambda gradient: receive(self._at_all(held, tokens), self._at_all(gradient, tokens))
                )

        if side == "input":
            handle = module.register_forward_pre_hook(lambda module, arguments: watch(module, arguments[0]))
        else:
            handle = module.register_forward_hook(lambda module, _arguments, output: watch(module, output))
        self._handles.append(handle)

    def on_routed(self, module: nn.Module, side: Side, receive: RoutedReceive) -> None:
        """Hand over the input or output of an expert's layer ``[n, size]`` with what the router says of its tokens."""

        def hand_over(module: nn.Module, value: Tensor) -> None:
            sent = routed(module)
            if self.positions is None or sent is None:
                return
            places = torch.isin(sent.tokens, self.positions).nonzero().flatten()
            tokens, weights, shares = (x.index_select(0, places) for x in (sent.tokens, sent.weights, sent.shares))
            receive(
                value.detach().index_select(0, places),
                Routed(torch.searchsorted(self.positions, tokens), weights, shares),
            )

        if side == "input":
            handle = module.register_forward_pre_hook(lambda module, arguments: hand_over(module, arguments[0]))
        else:
            handle = module.register_forward_hook(lambda module, _arguments, output: hand_over(module, output))
        self._handles.append(handle)

    def start_graph_at(self, embedding: nn.Module) -> None:
        """Start the graph at the embedded tokens, as no parameter requires a gradient."""
        self._handles.append(embedding.register_forward_hook(lambda _m, _i, output: output.requires_grad_()))

    def _at_all(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """Rows of all tokens that count, ``[n, size]``, of zeros where ``x`` has none; see ``_counted``."""
        assert self.positions is not None
        if tokens is None:
            return self._counted(x, None)
        places = torch.isin(tokens, self.positions).nonzero().flatten()
        rows = torch.searchsorted(self.positions, tokens.index_select(0, places))
        whole = x.new_zeros(len(self.positions), x.shape[-1])
        return whole.index_copy_(0, rows, x.index_select(0, places))

    def _counted(self, x: Tensor, tokens: Tensor | None) -> Tensor:
        """Rows of ``x [batch, length, size]`` that count, ``[n, size]``.

        Args:
            x: A row for each token of the batch, or for each of ``tokens``.
            tokens: Flat positions of the tokens that ``x`` has rows of; None if it has rows of all.
        """
        x = x.flatten(0, -2)
        assert self.positions is not None
        if tokens is not None:
            return x.index_select(0, torch.isin(tokens, self.positions).nonzero().flatten())
        return x if len(self.positions) == len(x) else x.index_select(0, self.positions)


def with_bias(inputs: Tensor, bias: bool) -> Tensor:
    """Append the homogeneous coordinate 1, which a bias multiplies, to inputs ``[tokens, C]`` if there is a bias."""
    return torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1) if bias else inputs
