"""Experts in canonical form: a linear layer for each matrix of each expert, in place of three-dimensional parameters.

transformers holds the experts of a block in parameters ``[experts, rows, columns]``, which no hook and no smaller
matrix knows how to look into. The canonical form computes the same with ordinary linear layers, whose weights are views
of these parameters. An export has the parameters back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from llm_surgeon.errors import UnsupportedModelError

# Name of transformers' function that multiplies the activation of the switches with the values.
_DEFAULT = "_default_apply_gate"
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


class _Factor:
    """Forward hook of a part that all tokens go to, whose output is multiplied by a factor for each token.

    Args:
        layer: Layer with one output, whose sigmoid is the factor.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, part: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Tell the layers of the part their tokens, which are all, and the factors."""
        x = arguments[0].detach().flatten(0, -2)
        with torch.no_grad():
            weights = self._layer(x).sigmoid().flatten()
        _tell(part, Routed(torch.arange(len(x), device=x.device), weights, torch.ones_like(weights)))


def tell_factor(part: nn.Module, layer: nn.Module) -> None:
    """Let the layers of a part know by what the part's output is multiplied, as those of an expert do.

    Args:
        part: Module that is called with the hidden states.
        layer: Layer with one output that reads them, whose sigmoid is the factor.
    """
    if not any(isinstance(hook, _Factor) for hook in part._forward_pre_hooks.values()):
        part.register_forward_pre_hook(_Factor(layer))


def _tell(part: nn.Module, routed: Routed) -> None:
    for module in part.modules():
        vars(module)[_ROUTED] = routed


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
        _tell(self, routed)
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
            # Gradients are handed over batch by batch: an expert without tokens in one has to be among them.
            if len(own) or hidden_states.requires_grad:
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


@dataclass(frozen=True)
class Layout:
    """Layout of experts in three-dimensional parameters.

    Attributes:
        transposed: Whether matrices are stored ``[columns, rows]``.
        interleaved: Whether a neuron's switch and value are neighbours, rather than all switches coming first.
    """

    transposed: bool = False
    interleaved: bool = False

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the switches and of the values, of rows ``[2 neurons, ...]``."""
        if self.interleaved:
            return rows[::2], rows[1::2]
        first, second = rows.chunk(2)
        return first, second

    def join(self, switches: Tensor, values: Tensor) -> Tensor:
        """Rows ``[2 neurons, ...]`` of switches and values; what ``split`` takes apart."""
        if self.interleaved:
            return torch.stack((switches, values), dim=1).flatten(0, 1)
        return torch.cat((switches, values))

    def oriented(self, matrix: Tensor) -> Tensor:
        """A matrix as it is stored, or a stored one as a linear layer has it."""
        return matrix.T if self.transposed else matrix


# Switches, then values, each matrix as a linear layer has it.
STACKED = Layout()


def canonical(experts: nn.Module, layout: Layout) -> Experts:
    """The canonical form of a module of experts; the layers' weights are views of its parameters.

    Args:
        experts: A module of transformers with ``gate_up_proj [experts, 2 neurons, width]``, ``down_proj [experts,
            width, neurons]`` and perhaps biases ``gate_up_proj_bias`` and ``down_proj_bias``.
        layout: Layout of the parameters.

    Raises:
        UnsupportedModelError: If the module holds its experts in another way.
    """
    found = Layout(getattr(experts, "is_transposed", False), not getattr(experts, "is_concatenated", True))
    if not getattr(experts, "has_gate", True) or found != layout:
        raise UnsupportedModelError(
            f"{type(experts).__name__} holds its experts in another way than the family's entry says.",
            "Correct layout in the entry; experts without gates are not supported.",
        )
    gate_up, down = cast(nn.Parameter, experts.gate_up_proj), cast(nn.Parameter, experts.down_proj)
    combine = _combine(experts, layout)
    biases = (getattr(experts, f"{name}_bias", None) for name in ("gate_up_proj", "down_proj"))
    first_bias, last_bias = (cast(Sequence[Any], [None] * len(down)) if bias is None else bias for bias in biases)

    def all_experts() -> Iterator[Expert]:
        for first, last, b1, b2 in zip(gate_up, down, first_bias, last_bias, strict=True):
            gate, up = layout.split(layout.oriented(first))
            of_gate, of_up = (None, None) if b1 is None else layout.split(b1)
            pairs = ((gate, of_gate), (up, of_up), (layout.oriented(last), b2))
            first_layer, second, third = (_linear(weight, bias, gate_up.requires_grad) for weight, bias in pairs)
            yield Expert(first_layer, second, third, combine)

    return Experts(all_experts()).train(experts.training)


def _combine(experts: nn.Module, layout: Layout) -> Callable[[Tensor, Tensor], Tensor]:
    """Neurons by switches and values: the activation times the value, or what the class computes of its own."""
    own: Any = type(experts)._apply_gate  # type: ignore[attr-defined]  # transformers gives it to these classes
    if own.__name__ == _DEFAULT:
        activation = cast(Callable[[Tensor], Tensor], experts.act_fn)
        return partial(_gated, activation)
    # Numbers that the function reads, without the module, whose parameters would stay in memory.
    numbers = SimpleNamespace(**{name: value for name, value in vars(experts).items() if isinstance(value, float)})
    return partial(_by_class, own, numbers, layout)


def _gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return activation(gate) * up


def _by_class(own: Callable[[Any, Tensor], Tensor], numbers: Any, layout: Layout, gate: Tensor, up: Tensor) -> Tensor:
    return own(numbers, layout.join(gate.T, up.T).T)


def _linear(weight: Tensor, bias: Tensor | None, gradient: bool) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=False, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach(), requires_grad=gradient)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=gradient)
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


def stacked(state: dict[str, Tensor], experts: str, layout: Layout) -> dict[str, Tensor]:
    """State of a model with the experts of one block in three-dimensional parameters again.

    Args:
        state: Tensors by name; layers without weights are not among them.
        experts: Path of the experts.
        layout: Layout of the parameters.
    """
    prefix = f"{experts}."
    numbers = sorted({int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)})

    def all_of(layer: str, kind: str) -> list[Tensor]:
        names = [f"{prefix}{number}.{layer}.{kind}" for number in numbers]
        return [state[name] for name in names if name in state]

    def joined(kind: str) -> list[Tensor]:
        return [layout.join(*pair) for pair in zip(all_of(GATE, kind), all_of(UP, kind), strict=True)]

    left = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    left[f"{prefix}gate_up_proj"] = torch.stack([layout.oriented(matrix) for matrix in joined("weight")])
    left[f"{prefix}down_proj"] = torch.stack([layout.oriented(matrix) for matrix in all_of(DOWN, "weight")])
    if biases := joined("bias"):
        left[f"{prefix}gate_up_proj_bias"] = torch.stack(biases)
        left[f"{prefix}down_proj_bias"] = torch.stack(all_of(DOWN, "bias"))
    return left
