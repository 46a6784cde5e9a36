"""What the result will be: its parameters, its weight files, and the disk that the exports take."""

from __future__ import annotations

from llm_surgeon.config import PruneConfig
from llm_surgeon.planning.skeleton import Skeleton
from llm_surgeon.records import LayerKind, Size

# Files of an export beside its weights: tokenizer, report, picture, modelling file.
SMALL_FILES = 32 * 2**20


def kinds_of(skeleton: Skeleton) -> tuple[LayerKind, ...]:
    """Prunable layers by kind and shape, in the order of the forward pass."""
    counts: dict[tuple[str, int, int], int] = {}
    for layer in skeleton.anatomy.layers.values():
        key = layer.kind, layer.rows, layer.columns
        counts[key] = counts.get(key, 0) + 1
    return tuple(
        LayerKind(kind=kind, layers=count, rows=rows, columns=columns)
        for (kind, rows, columns), count in counts.items()
    )


def dense_size(skeleton: Skeleton) -> Size:
    """Of the model before the run."""
    return Size(prunable=skeleton.anatomy.prunable_weights, total=skeleton.parameters)


def size_after(skeleton: Skeleton, sparsity: float) -> Size:
    """Of the model once a share of its prunable weights is gone; biases of removed rows are not taken off."""
    dense = dense_size(skeleton)
    gone = round(sparsity * dense.prunable)
    return Size(prunable=dense.prunable - gone, total=dense.total - gone)


def weight_bytes(skeleton: Skeleton, config: PruneConfig, sparsity: float) -> int:
    """Bytes of the tensors in an export's weight files; zeros in matrices of the old shape are stored."""
    stored = size_after(skeleton, sparsity if config.parts else 0.0).total
    return stored * skeleton.dtype.itemsize


def disk_bytes(skeleton: Skeleton, config: PruneConfig) -> int:
    """Bytes of all exports of a run; shots that are exported as well are larger than the last."""
    schedule = config.sparsity_schedule
    exported = {*config.export_shots, config.shots}
    return sum(weight_bytes(skeleton, config, schedule[shot - 1]) + SMALL_FILES for shot in exported)
