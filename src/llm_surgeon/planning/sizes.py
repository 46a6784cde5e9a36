"""Sizes of the result: its parameters, its weight files, and the disk that exports and checkpoints take."""

from __future__ import annotations

from llm_surgeon.curvature import estimator_of
from llm_surgeon.export.formats import formats_of, main_format
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.pruning.checkpoint import KEPT, parameters_beside
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import LayerKind, Size

# Bytes of an export's files beside its weights: tokenizer, report, picture, modelling file.
SMALL_FILES = 32 * 2**20
# Bytes on disk of each weight that is trained after the last shot: two states of three numbers, and two best values.
STATE_BYTES = (2 * 3 + 2) * 4


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
    """Size of the model before the run."""
    return Size(prunable=skeleton.anatomy.prunable_weights, total=skeleton.parameters)


def size_after(skeleton: Skeleton, sparsity: float) -> Size:
    """Size of the model after a share of its prunable weights is removed; biases of removed rows still count."""
    dense = dense_size(skeleton)
    gone = round(sparsity * dense.prunable)
    return Size(prunable=dense.prunable - gone, total=dense.total - gone)


def weight_bytes(skeleton: Skeleton, config: PruneConfig, sparsity: float) -> int:
    """Bytes of an export's weight files, of the format that the report describes."""
    return main_format(config).nbytes(stored_parameters(skeleton, config, sparsity), skeleton.dtype)


def stored_parameters(skeleton: Skeleton, config: PruneConfig, sparsity: float) -> int:
    """Parameters that an export stores; zeros in matrices of the old shape are among them."""
    return size_after(skeleton, sparsity if config.parts else 0.0).total


def disk_bytes(skeleton: Skeleton, config: PruneConfig) -> int:
    """Largest bytes of a run's exports and checkpoints at once; earlier ones are larger than later ones."""
    schedule = config.sparsity_schedule
    exported, most = 0, 0
    for shot, sparsity in enumerate(schedule, start=1):
        if shot in (*config.export_shots, config.shots):
            stored = stored_parameters(skeleton, config, sparsity)
            exported += sum(form.nbytes(stored, skeleton.dtype) for form in formats_of(config)) + SMALL_FILES
        # The kept checkpoints, until the next one is complete.
        held = schedule[max(0, shot - 1 - KEPT) : shot]
        most = max(most, exported + sum(checkpoint_bytes(skeleton, config, at) for at in held))
    return most + (recovery_bytes(skeleton, config) if config.recover_tokens is not None else 0)


def recovery_bytes(skeleton: Skeleton, config: PruneConfig) -> int:
    """Bytes of the training after the last shot: two states and two sets of weights in float32, and its result."""
    return STATE_BYTES * stored_parameters(skeleton, config, config.sparsity) + weight_bytes(
        skeleton, config, config.sparsity
    )


def checkpoint_bytes(skeleton: Skeleton, config: PruneConfig, sparsity: float) -> int:
    """Largest bytes of a shot's checkpoint: weights and biases, masks, and factors for the next power iteration."""
    layers, itemsize = skeleton.anatomy.layers.values(), skeleton.dtype.itemsize
    weights = size_after(skeleton, sparsity).prunable if config.parts else dense_size(skeleton).prunable
    biases = sum(layer.rows for layer in layers if layer.bias)
    beside = parameters_beside(skeleton.network, skeleton.anatomy, config)
    others = sum(skeleton.network.get_parameter(name).numel() for name in beside)
    stored = others if config.permute else weights + biases + others
    # Masks take a bit for each weight, or a byte for each row and column.
    masks = sum(layer.rows + layer.columns if config.parts else layer.rows * layer.columns // 8 for layer in layers)
    estimator = estimator_of(config)
    start = 0 if estimator is None else estimator.start_bytes(layers)
    return stored * itemsize + masks + start
