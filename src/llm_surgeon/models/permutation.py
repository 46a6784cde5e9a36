"""Orders of channels, folded into the weights: channels get other neighbours, and the network's function stays.

An N:M pattern keeps N of every M *neighbouring* inputs, so it matters in which order the inputs of a layer come
(``llm_surgeon.mathematics.channel_permutation`` finds a good order). The order of some channels is free: only the
layers that write them and the layers that read them must agree on it. Two kinds are folded here:

- channels inside a part, as the part says (``Part.orders``): the neurons of a feed-forward part (rows of its input
  layers, columns of its output layer), or the dimensions within a value head (rows of the value layer, columns of the
  output projection in every query head that shares it);
- the residual stream, with one order for the whole model, as every block adds to it: embeddings, norms, columns of
  the layers that read it, rows of those that write it, columns of the head.

The order of keys and queries is left alone: no weight matrix reads their product along it. Channel i afterwards is
channel ``permutation[i]`` before. Everything works in place on a dense model, or one whose removed weights are
zeros. The caller has to permute the masks in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models.family import Family
from llm_surgeon.models.parts import ChannelOrder, PartEntry
from llm_surgeon.models.streaming import weights_of


@torch.no_grad()
def fold_order(model: PreTrainedModel, order: ChannelOrder, permutation: Tensor) -> None:
    """Reorder channels inside a part, each within its set.

    Args:
        model: The model of the part, changed in place.
        order: The channels, see ``Part.orders``.
        permutation: Orders ``[sets, channels]``, long: each row is an order of that set's channels.

    Raises:
        ValueError: If a row is no permutation of a set's channels, or there is not one for each set.
        UnsupportedModelError: If a layer is not a plain linear layer.
    """
    reader = _linear(model, order.reader.layer)
    writers = [(_linear(model, rows.layer), rows) for rows in order.writers]
    if len(permutation) != order.sets:
        raise ValueError(f"{len(permutation)} orders of {order.name} for {order.sets} sets")
    for one in permutation:
        _check(one, order.channels, order.name)
    for layer, rows in writers:
        moved = _moved(layer.out_features, rows.index, permutation)
        _reorder(model, layer.weight, 0, moved)
        if layer.bias is not None:
            _reorder(model, layer.bias, 0, moved)
    _reorder(model, reader.weight, 1, _moved(reader.in_features, order.reader.index, permutation[:, None]))


@torch.no_grad()
def fold_residual(model: PreTrainedModel, family: Family, permutation: Tensor) -> None:
    """Reorder the channels of the residual stream, throughout the model.

    Norms see a channel through the mean and variance over all of them, which have no order. Tied embeddings are one
    tensor and reordered once. With a projection between the embeddings and the stream (some OPT models) the stream
    ends there.

    Args:
        model: A model of the family, changed in place.
        family: Entry of the model's architecture.
        permutation: Order of the channels, long ``[hidden]``.

    Raises:
        ValueError: If ``permutation`` is no permutation of the channels.
        UnsupportedModelError: If a layer is not a plain linear layer, or the model has parameters that its entry
            says nothing about, which may depend on the order.
    """
    along = check_residual(model, family)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    name, axis = next(iter(along.items()))
    _check(permutation, parameters[name].shape[axis], "channels")
    # A tied tensor has several names.
    done: set[int] = set()
    for name, axis in along.items():
        if id(parameters[name]) not in done:
            _reorder(model, parameters[name], axis, permutation)
            done.add(id(parameters[name]))


def check_residual(model: PreTrainedModel, family: Family) -> dict[str, int]:
    """Find the parameters that carry the residual stream, by name, and the axis of each that the stream runs along.

    Raises:
        UnsupportedModelError: If the stream cannot be reordered, see ``fold_residual``.
    """
    if family.text_config is not None:
        raise UnsupportedModelError(
            f"In a model of type {family.model_type!r}, other towers write into the residual stream and stay as they "
            "are, so that its channels cannot be reordered.",
            "Leave --permute out.",
        )
    along = dict(_stream(model, family))
    _check_complete(model, family, along)
    return along


def _stream(model: PreTrainedModel, family: Family) -> Iterator[tuple[str, int]]:
    """Names of the parameters that carry the residual stream, and the axis of each that the stream runs along."""
    residual = family.residual
    project_in, project_out = _optional(model, residual.project_in), _optional(model, residual.project_out)
    if project_in is None:
        yield f"{residual.tokens}.weight", 1
    else:
        yield from _rows(model, cast(str, residual.project_in))
    if _optional(model, residual.positions) is not None:
        yield f"{residual.positions}.weight", 1
    for number in range(len(cast(nn.ModuleList, model.get_submodule(family.blocks)))):
        prefix = f"{family.blocks}.{number}."
        for name in residual.norms:
            yield from _vectors(model, prefix + name)
        block = model.get_submodule(prefix.rstrip("."))
        for part in family.parts:
            for name in _numbered(part, part.readers, block):
                if _optional(model, prefix + name) is not None:
                    yield from _columns(model, prefix + name)
            for name in _numbered(part, part.writers, block):
                if _optional(model, prefix + name) is not None:
                    yield from _rows(model, prefix + name)
            for name in part.also_read:
                if _optional(model, prefix + name.rpartition(".")[0]) is not None:
                    yield prefix + name, 1
    if _optional(model, residual.final_norm) is not None:
        yield from _vectors(model, residual.final_norm)
    yield from _columns(model, head_path(model) if project_out is None else cast(str, residual.project_out))


def _check_complete(model: PreTrainedModel, family: Family, along: dict[str, int]) -> None:
    """Check that each parameter carries the stream, or belongs to a layer that the family's entry describes."""
    known = set()
    for number, block in enumerate(cast(nn.ModuleList, model.get_submodule(family.blocks))):
        groups = ((part, [name for group in part.input_groups for name in group]) for part in family.parts)
        layers = [name for part, names in groups for name in (*_numbered(part, names, block), *part.inside)]
        known |= {f"{family.blocks}.{number}.{name}" for name in layers}
    known |= {family.residual.tokens, head_path(model)}
    known |= {name for name in (family.residual.project_in, family.residual.project_out) if name is not None}
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in along and name.rpartition(".")[0] not in known:
            raise UnsupportedModelError(
                f"The entry for {family.model_type!r} does not say how {name} depends on the order of channels.",
                "Leave the residual stream in its order, or describe it in the entry in llm_surgeon/models.",
            )


def _numbered(part: PartEntry, names: Iterable[str], block: nn.Module) -> Iterator[str]:
    """Names of layers in a block, with those of all copies of a layer."""
    return (copy for name in names for copy in part.numbered(name, block))


def head_path(model: PreTrainedModel) -> str:
    """Path of the head."""
    head = model.get_output_embeddings()
    path: str = next(name for name, module in model.named_modules() if module is head)
    return path


def _optional(model: PreTrainedModel, name: str | None) -> nn.Module | None:
    """The module of a name; None if the model has no such module."""
    try:
        return None if name is None else model.get_submodule(name)
    except AttributeError:
        return None


def _columns(model: PreTrainedModel, name: str) -> Iterator[tuple[str, int]]:
    """Parameters of a layer that reads the stream."""
    _linear(model, name)
    yield f"{name}.weight", 1


def _rows(model: PreTrainedModel, name: str) -> Iterator[tuple[str, int]]:
    """Parameters of a layer that writes the stream."""
    yield f"{name}.weight", 0
    if _linear(model, name).bias is not None:
        yield f"{name}.bias", 0


def _vectors(model: PreTrainedModel, name: str) -> Iterator[tuple[str, int]]:
    """Parameters of a norm: weight, bias, or none."""
    for parameter, _ in model.get_submodule(name).named_parameters():
        yield f"{name}.{parameter}", 0


def _linear(model: PreTrainedModel, name: str) -> nn.Linear:
    module = model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__}, not a dense linear layer.",
            "Reorder channels before anything is cut out of the model, or quantised.",
        )
    return module


def _moved(size: int, index: Tensor, permutation: Tensor) -> Tensor:
    """Order ``[size]`` of all rows or columns after the rows or columns of ``index`` move along its last axis."""
    order, permutation = torch.arange(size), permutation.cpu().expand_as(index)
    order[index.flatten()] = index.gather(-1, permutation).flatten()
    return order


def _reorder(model: PreTrainedModel, parameter: Tensor, axis: int, permutation: Tensor) -> None:
    # Written into the same parameter, so that tied ones stay tied.
    weights_of(model).write(parameter, parameter.data.index_select(axis, permutation.to(parameter.device)))


def _check(permutation: Tensor, size: int, what: str) -> None:
    if not torch.equal(permutation.sort().values.cpu(), torch.arange(size)):
        raise ValueError(f"not a permutation of {size} {what}")
