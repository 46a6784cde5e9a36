"""Experts in canonical form: a linear layer for each matrix of each expert, in place of three-dimensional parameters.

transformers holds the experts of a block in parameters ``[experts, rows, columns]``, which no hook and no smaller
matrix knows how to look into. The canonical form computes the same with ordinary linear layers, whose weights are views
of these parameters. An export has the parameters back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from llm_surgeon.errors import UnsupportedModelError

# Names of the layers of an expert.
GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


# Attribute of a layer that is run on some tokens of a batch only.
_ROUTED = "_routed"


@dataclass(frozen=True)
class Routed:
    """Tokens of a batch that an expert is run on.

    Attributes:
        tokens: Flat positions in the batch, ``[n]``.
        weights: Weights by which the router multiplies the expert's outputs, ``[n]``.
        shares: The same as shares of the weights of all experts that the token is sent to, ``[n]``.
    """

    tokens: Tensor
    weights: Tensor
    shares: Tensor


def routed(module: nn.Module) -> Routed | None:
    """Tokens that a layer is run on; None if these are all tokens of the batch."""
    found: Routed | None = vars(module).get(_ROUTED)
    return found


def routed_tokens(module: nn.Module) -> Tensor | None:
    """Flat positions ``[n]`` of the tokens that a layer is run on; None if these are all tokens of the batch."""
    found = routed(module)
    return None if found is None else found.tokens


class Expert(nn.Module):
    """One expert: ``down_proj(combine(gate_proj(x), up_proj(x)))``.

    Args:
        gate: Layer of the switches of the neurons, ``[neurons, width]``.
        up: Layer of their values, ``[neurons, width]``.
        down: Layer that reads the neurons, ``[width, neurons]``.
        combine: Neurons by switches and values.
    """

    def __init__(
        self, gate: nn.Linear, up: nn.Linear, down: nn.Linear, combine: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self._combine = combine

    def forward(self, x: Tensor, routed: Routed) -> Tensor:
        """Output ``[n, width]`` for some tokens.

        Args:
            x: Their hidden states, ``[n, width]``.
            routed: The tokens, by which hooks know them.
        """
        for layer in (self.gate_proj, self.up_proj, self.down_proj):
            for module in layer.modules():
                vars(module)[_ROUTED] = routed
        return cast(Tensor, self.down_proj(self._combine(self.gate_proj(x), self.up_proj(x))))


class Experts(nn.ModuleList):
    """The experts of one block, numbered as in the dense model.

    Attributes:
        present: Numbers of the experts that the router knows, in its order.
    """

    def __init__(self, experts: Iterator[Expert]) -> None:
        super().__init__(experts)
        self.present = list(range(len(self)))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs, weighted by the router, ``[tokens, width]``.

        Args:
            hidden_states: ``[tokens, width]``.
            top_k_index: Chosen experts of each token in the router's numbers, ``[tokens, chosen]``.
            top_k_weights: Their weights, ``[tokens, chosen]``.
        """
        pairs = top_k_index.flatten().argsort(stable=True)
        tokens = pairs // top_k_index.shape[-1]
        weights = top_k_weights.flatten().index_select(0, pairs)
        shares = (top_k_weights / top_k_weights.sum(-1, keepdim=True)).flatten().index_select(0, pairs)
        sizes = self._loads(top_k_index)
        result = torch.zeros_like(hidden_states)
        parts = zip(self.present, *(x.split(sizes) for x in (tokens, weights, shares)), strict=True)
        for number, own, weight, share in parts:
            if len(own):
                routed = Routed(own, weight.detach(), share.detach())
                output = self[number](hidden_states.index_select(0, own), routed) * weight[:, None]
                result = result.index_add(0, own, output.to(result.dtype))
        return result

    def _loads(self, top_k_index: Tensor) -> list[int]:
        """Number of tokens of each expert that the router knows."""
        count = len(self.present)
        if isinstance(top_k_index, FakeTensor) or top_k_index.is_meta:
            # Numbers are unknown where only shapes are: all experts then get equally many.
            share, rest = divmod(top_k_index.numel(), count)
            return [share + (number < rest) for number in range(count)]
        return cast(list[int], torch.bincount(top_k_index.flatten(), minlength=count).tolist())


def canonical(experts: nn.Module) -> Experts:
    """The canonical form of a module of experts; the layers' weights are views of its parameters.

    Args:
        experts: A module of transformers with ``gate_up_proj [experts, 2 neurons, width]``, the switches first, and
            ``down_proj [experts, width, neurons]``.

    Raises:
        UnsupportedModelError: If the module holds its experts in another way.
    """
    if not (getattr(experts, "has_gate", True) and getattr(experts, "is_concatenated", True)):
        raise _unknown(experts)
    if getattr(experts, "is_transposed", False) or getattr(experts, "has_bias", False):
        raise _unknown(experts)
    gate_up, down = cast(nn.Parameter, experts.gate_up_proj), cast(nn.Parameter, experts.down_proj)
    activation = cast(Callable[[Tensor], Tensor], experts.act_fn)

    def combine(gate: Tensor, up: Tensor) -> Tensor:
        return activation(gate) * up

    def all_experts() -> Iterator[Expert]:
        for first, last in zip(gate_up, down, strict=True):
            gate, up = first.chunk(2)
            yield Expert(_linear(gate, gate_up), _linear(up, gate_up), _linear(last, down), combine)

    return Experts(all_experts()).train(experts.training)


def _unknown(experts: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(experts).__name__} holds its experts transposed, interleaved, with biases or without gates.",
        "Prune a model whose experts are gated, without biases, one matrix after the other.",
    )


def _linear(weight: Tensor, parameter: nn.Parameter) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach(), requires_grad=parameter.requires_grad)
    return layer


@torch.no_grad()
def keep_experts(experts: Experts, router: nn.Module, kept: list[int], tensors: tuple[str, ...]) -> None:
    """Let a router know some of its experts only, in place: tokens then go to the best of these.

    Args:
        experts: The experts in canonical form.
        router: Their router.
        kept: Numbers of the experts that are left, as in the dense model, ascending.
        tensors: Names of the router's parameters and buffers with an entry for each expert.
    """
    if kept == experts.present:
        return
    rows = torch.tensor([experts.present.index(number) for number in kept])
    for name in tensors:
        tensor = getattr(router, name, None)
        if isinstance(tensor, Tensor):
            left = tensor.detach().index_select(0, rows.to(tensor.device))
            is_parameter = isinstance(tensor, nn.Parameter)
            setattr(router, name, nn.Parameter(left, requires_grad=tensor.requires_grad) if is_parameter else left)
    if hasattr(router, "num_experts"):
        router.num_experts = len(kept)  # type: ignore[assignment]  # a plain attribute
    experts.present = kept


def stacked(state: dict[str, Tensor], experts: str) -> dict[str, Tensor]:
    """State of a model with the experts of one block in three-dimensional parameters again.

    Args:
        state: Tensors by name; layers without weights are not among them.
        experts: Path of the experts.
    """
    prefix = f"{experts}."
    numbers = sorted({int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)})

    def weights(layer: str) -> list[Tensor]:
        return [state[f"{prefix}{number}.{layer}.weight"] for number in numbers]

    both = [torch.cat(pair) for pair in zip(weights(GATE), weights(UP), strict=True)]
    left = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return left | {f"{prefix}gate_up_proj": torch.stack(both), f"{prefix}down_proj": torch.stack(weights(DOWN))}
