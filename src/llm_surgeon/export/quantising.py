"""Fitness of a model's matrices for quantised types: whose columns fill whole blocks, and what the others become."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from llm_surgeon.export.standard_layers import full_matrix, head_width
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.family import Family
from llm_surgeon.models.parts import Attention, FeedForward
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.quantised import QUANTISED

_BLOCKS = sorted({row.block for row in QUANTISED.values()})
_NOTHING = "every matrix of the blocks fits"


def foreseen_fit(config: PruneConfig, anatomy: Anatomy, settings: Any) -> tuple[str, ...]:
    """Sentences on the quantised types of llama.cpp that the matrices of a recipe's result fit; none if it has gaps.

    Args:
        config: The recipe.
        anatomy: Prunable layers of the dense model.
        settings: Configuration of the dense model.
    """
    if any(part not in ("neurons", "heads", "blocks") for part in config.parts):
        return ()
    dense = {layer.kind: layer.columns for layer in anatomy.layers.values()}
    changing: dict[str, int] = {}
    for entry in anatomy.family.parts:
        name = anatomy.family.short_name(entry.writers[0])
        changes = set(entry.structures) & set(config.parts)
        if changes and isinstance(entry, Attention):
            # Heads go one by one, or by as many as a quantised type needs.
            changing[name] = config.block_of_quantised if config.block_of_quantised > 1 else head_width(settings)
        elif changes and isinstance(entry, FeedForward):
            changing[name] = config.widths_multiple
    fixed = {name: columns for name, columns in dense.items() if name not in changing}
    return tuple(_sentence(block, fixed, changing) for block in _BLOCKS)


def measured_fit(model: PreTrainedModel, family: Family) -> tuple[str, ...]:
    """Sentences on the quantised types of llama.cpp that the matrices of a model fit.

    Args:
        model: The model, dense or pruned; its layers skip no channels.
        family: Entry of its architecture.
    """
    columns: dict[str, dict[int, int]] = {}
    for number, _ in enumerate(model.get_submodule(family.blocks).children()):
        for name in family.layers:
            weight, _ = full_matrix(model.get_submodule(f"{family.blocks}.{number}.{name}"))
            if weight is not None:
                found = columns.setdefault(family.short_name(name), {})
                found[weight.shape[1]] = found.get(weight.shape[1], 0) + 1
    return tuple(_counted(block, columns) for block in _BLOCKS)


def _counted(block: int, columns: Mapping[str, Mapping[int, int]]) -> str:
    """Sentence on a block size, with the number of matrices of each kind that do not fit."""
    whole = sum(sum(found.values()) for found in columns.values())
    misfits = {name: sum(count for width, count in found.items() if width % block) for name, found in columns.items()}
    count = sum(misfits.values())
    if not count:
        return f"{_types(block)}: {_NOTHING}."
    names = ", ".join(f"{number} {name}" for name, number in misfits.items() if number)
    return (
        f"{_types(block)}: {count} of {whole} matrices of the blocks do not fit ({names}), and become "
        f"{_fallbacks(block)}."
    )


def _sentence(block: int, fixed: Mapping[str, int], changing: Mapping[str, int]) -> str:
    """Sentence on a block size, with the kinds of matrices that do not fit.

    Args:
        block: Columns of a block.
        fixed: Columns of kinds of matrices that keep them.
        changing: Multiples that the columns of the other kinds will be.
    """
    misfits = []
    for columns in dict.fromkeys(count for count in fixed.values() if count % block):
        names = ", ".join(name for name, count in fixed.items() if count == columns)
        misfits.append(f"{names} ({columns:,} columns)")
    misfits += [
        f"{name} in blocks whose width does not happen to fit"
        for name, multiple in changing.items()
        if multiple % block
    ]
    if not misfits:
        return f"{_types(block)}: {_NOTHING}."
    return f"{_types(block)}: not for {', '.join(misfits)}, which become {_fallbacks(block)}."


def _types(block: int) -> str:
    names = ", ".join(name.upper() for name, row in QUANTISED.items() if row.block == block)
    return f"{names} (blocks of {block} columns)"


def _fallbacks(block: int) -> str:
    """What llama.cpp gives to matrices that do not fit, type by type."""
    rows = [(name.upper(), row.fallback) for name, row in QUANTISED.items() if row.block == block]
    if len({fallback for _, fallback in rows}) == 1:
        return rows[0][1]
    groups = {fallback: [name for name, other in rows if other == fallback] for _, fallback in rows}
    return ", ".join(f"{fallback} (of {' and '.join(names)})" for fallback, names in groups.items())
