"""Forms of an export: a plain transformers class, standard blocks with widths of their own, or blocks with gaps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy, LinearLayer
from llm_surgeon.models.family import Family
from llm_surgeon.models.matrix import core_of, layer_shape
from llm_surgeon.models.modeling_pruned import PrunedLinear
from llm_surgeon.models.modeling_text import base_class

# "plain": a class of transformers. "per layer": blocks of a class of transformers, each with its own widths, which a
# short modelling file builds. "gaps": a modelling file with layers that skip channels, and with emptied parts.
FormKind = Literal["plain", "per layer", "gaps"]


@dataclass(frozen=True)
class Form:
    """Form in which a model is written.

    Attributes:
        kind: Code that the export needs; see ``FormKind``.
        settings: Entries of the language model's configuration that differ from the dense model's, by their names in
            transformers.
        blocks: Numbers of the blocks that are written; the others have nothing left.
    """

    kind: FormKind
    settings: dict[str, Any]
    blocks: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether a class of transformers loads the export, without code from the checkpoint."""
        return self.kind == "plain"


def form_of(anatomy: Anatomy, keep: Mapping[str, KeepMask] | None, config: Any) -> Form:
    """The simplest form that holds a pruned model.

    Args:
        anatomy: Layers of the model.
        keep: Rows and columns that are left; None if the matrices have their old shapes.
        config: Configuration of the dense model.
    """
    family, everything = anatomy.family, tuple(range(anatomy.blocks))
    if keep is None:
        return Form("plain", {}, everything)
    config = family.settings_of(config)
    blocks = everything if family.numbered else _blocks_left(anatomy, keep)
    settings = _depth(family, config, blocks) if blocks != everything else {}
    widths = _widths(anatomy, keep, blocks)
    if widths is None or not base_class(family):
        return _with_gaps(anatomy, keep, blocks, settings)
    equal = {name: next(iter(values.values())) for name, values in widths.items() if len(set(values.values())) == 1}
    equal = equal if builds(config, settings | equal) else {}
    if equal.keys() == widths.keys():
        return Form("plain", settings | equal, blocks)
    # The modelling file of standard blocks is for the configuration of a language model by itself, whose blocks have no
    # entries of their own before.
    if family.text_config is not None or "per_layer_config" in config.to_dict():
        return _with_gaps(anatomy, keep, blocks, settings)
    own = {
        str(number): {name: values[block] for name, values in widths.items() if name not in equal and block in values}
        for number, block in enumerate(blocks)
    }
    return Form("per layer", settings | equal | {"per_layer_config": own}, blocks)


def _with_gaps(
    anatomy: Anatomy, keep: Mapping[str, KeepMask], blocks: tuple[int, ...], settings: Mapping[str, Any]
) -> Form:
    """The form with layers that skip channels, and with emptied parts."""
    entries = _pruned_entries(anatomy, keep, blocks) | _of_experts(anatomy, keep, blocks)
    return Form("gaps", dict(settings) | entries, blocks)


def _blocks_left(anatomy: Anatomy, keep: Mapping[str, KeepMask]) -> tuple[int, ...]:
    """Blocks that have something left; all if none has, and one at least that counts the tokens of a cached text."""
    everything = range(anatomy.blocks)
    left = {block for block in everything if not _is_dead(anatomy, keep, block)} or set(everything)
    counting = [part.block for part in anatomy.located if part.entry.counts_tokens]
    if left.isdisjoint(counting):
        left.update(counting[:1])
    return tuple(sorted(left))


def parameters_of(model: nn.Module, anatomy: Anatomy, keep: Mapping[str, KeepMask] | None, config: Any) -> int:
    """Number of parameters of a model's export, tied ones counted once.

    A block that has nothing left is not written, nor are its norms.

    Args:
        model: The pruned model.
        anatomy: Layers of the model.
        keep: Rows and columns that are left; None if the matrices have their old shapes.
        config: Configuration of the dense model.
    """
    blocks = form_of(anatomy, keep, config).blocks
    empty = emptied(model, anatomy)
    sizes = {
        name: parameter.numel() for name, parameter in model.named_parameters() if not name.startswith(tuple(empty))
    }
    sizes |= {name: len(bias) for name, bias in empty.items() if bias is not None}
    return sum(size for name, size in sizes.items() if renamed(anatomy, blocks, name) is not None)


def emptied(model: nn.Module, anatomy: Anatomy) -> dict[str, Tensor | None]:
    """Biases of the layers that have no weights left, by the beginning of the layer's parameter names.

    A bias has its full width, as in ``NoLinear``; it is None if the layer has no bias left. An expert that is gone has
    none.
    """
    gone = {name for part in anatomy.located if part.keeps_form for name in part.layers}
    found: dict[str, Tensor | None] = {}
    for name, layer in anatomy.layers.items():
        module, core = model.get_submodule(name), core_of(model, layer)
        if core.weight.numel():
            continue
        bias = None if core.bias is None or name in gone else core.bias.detach()
        if bias is not None and isinstance(module, PrunedLinear) and module.output_index is not None:
            bias = bias.new_zeros(module.out_features).scatter(0, module.output_index, bias)
        found[f"{name}."] = None if bias is None or not len(bias) else bias
    return found


def renamed(anatomy: Anatomy, blocks: tuple[int, ...], name: str) -> str | None:
    """Name of a parameter or module when only ``blocks`` are written; None if its block is not."""
    prefix = f"{anatomy.family.blocks}."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{blocks.index(int(number))}.{rest}" if int(number) in blocks else None


def _layers_of(anatomy: Anatomy, block: int) -> list[LinearLayer]:
    return [layer for layer in anatomy.layers.values() if layer.block == block]


def _is_dead(anatomy: Anatomy, keep: Mapping[str, KeepMask], block: int) -> bool:
    """Whether a block adds nothing to the residual stream: all of it is prunable and gone, and has no biases."""
    names = {name for part in anatomy.located if part.block == block for name in part.layers}
    layers = _layers_of(anatomy, block)
    return len(layers) == len(names) and all(not layer.bias and not keep[layer.name].weights for layer in layers)


def _depth(family: Family, config: Any, blocks: tuple[int, ...]) -> dict[str, Any]:
    """Entries of the configuration that depend on the number of blocks."""
    settings: dict[str, Any] = {"num_hidden_layers": len(blocks)}
    for name in family.per_block:
        values = getattr(config, name, None)
        if values is not None:
            settings[name] = [values[block] for block in blocks]
    return settings


def builds(config: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a configuration class takes other numbers: some want a width that the number of heads divides.

    Args:
        config: Configuration of the dense language model.
        settings: Entries that differ.
    """
    try:
        type(config).from_dict(config.to_dict() | dict(settings))
    # A class may check its entries in any way, and raise any error.
    except Exception:
        return False
    return True


def _widths(
    anatomy: Anatomy, keep: Mapping[str, KeepMask], blocks: tuple[int, ...]
) -> dict[str, dict[int, int]] | None:
    """Entries of the configuration that give the blocks their widths, and each block's value.

    Blocks are numbered as in the dense model. Widths that all blocks have left as they were are not among the entries.

    Returns:
        Values by the number of the block, by the name of the entry; None if no entries can express the widths.
    """
    extents, dense = anatomy.extents(keep), anatomy.dense_masks()
    layers = [layer for block in blocks for layer in _layers_of(anatomy, block)]
    if any(keep[layer.name].shape != extents[layer.name].shape for layer in layers):
        return None
    widths: dict[str, dict[int, int]] = {}
    for entry in anatomy.family.parts:
        parts = [part for part in anatomy.located if part.entry == entry and part.block in blocks]
        # A part of which a layer is ignored keeps its widths.
        left = [part.sizes(keep if anatomy.layers.keys() >= set(part.layers) else dense) for part in parts]
        if left == [part.sizes(dense) for part in parts]:
            continue
        if entry.fixed or any(0 in sizes.values() for sizes in left):
            return None
        for part, sizes in zip(parts, left, strict=True):
            for name, value in sizes.items():
                widths.setdefault(name, {})[part.block] = value
    return widths


def _pruned_entries(anatomy: Anatomy, keep: Mapping[str, KeepMask], blocks: tuple[int, ...]) -> dict[str, Any]:
    """Entries of the configuration that the modelling file reads."""
    extents = anatomy.extents(keep)
    # Their tensors are no linear layers in the class.
    inside = {name for part in anatomy.located if part.keeps_form for name in part.layers}
    linears = {
        renamed(anatomy, blocks, name): layer_shape(layer, keep[name], extents[name])
        for name, layer in anatomy.layers.items()
        if name not in inside
    }
    narrowed = {renamed(anatomy, blocks, path): counts for path, counts in anatomy.counts(keep).items()}
    left_of = {path: left for part in anatomy.parts for path, left in part.left(keep).items()}
    replaced = {renamed(anatomy, blocks, path): left for path, left in left_of.items()}
    return {
        "pruned_linears": {name: shape for name, shape in linears.items() if name is not None},
        "pruned_attention": {path: counts for path, counts in narrowed.items() if path is not None},
        "pruned_attention_emptied": {path: left for path, left in replaced.items() if path is not None},
    }


def _of_experts(anatomy: Anatomy, keep: Mapping[str, KeepMask], blocks: tuple[int, ...]) -> dict[str, Any]:
    """Entries of the configuration with the widths of parts that the modelling file builds as the class has them.

    Raises:
        UnsupportedModelError: If blocks have different widths.
    """
    parts = [part for part in anatomy.located if part.keeps_form and part.block in blocks]
    sizes = [part.sizes(keep) for part in parts if anatomy.layers.keys() >= set(part.layers)]
    if any(own != sizes[0] for own in sizes):
        raise UnsupportedModelError(
            "Blocks are left with different experts, and one with an emptied part, which no export can hold at once.",
            "Give --uniform, or a --min-width above 0.",
        )
    return dict(sizes[0]) if sizes else {}
