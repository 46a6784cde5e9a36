"""Rough seconds of the phases of a run: operations counted from shapes, over a rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llm_surgeon.curvature import passes_needed
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.passes.batch_major import Estimation, Order
from llm_surgeon.planning.trace import estimation_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.refit.gates import BACKWARD_PASSES, FORWARD_PASSES
from llm_surgeon.refit.reconstruction import DENSE_RUNS, PRUNED_RUNS

# Operations per second of common machines: of one CPU core with matrix units, and of a GPU of a data centre.
CPU_CORE = {"bfloat16": 1.0e11, "float32": 0.5e11}
GPU = {"bfloat16": 2.0e14, "float32": 0.3e14}
# Bytes per second from and to a disk.
DISK = 5e8
# Seconds of the fresh process of the reload check, beside reading the weights.
RELOAD = 10.0
# The speed comparison runs either model six times, and decodes 32 tokens, each of which reads all weights.
SPEED_RUNS, SPEED_PROMPT, SPEED_DECODED, MEMORY_RATE = 12, 512, 32, 1e10


@dataclass(frozen=True)
class Rates:
    """Operations per second of passes in the recipe's arithmetic, and of float32 decompositions."""

    passes: float
    float32: float


def default_rates(config: PruneConfig, device: torch.device) -> Rates:
    """Those of a common machine with as many cores as this one."""
    if device.type == "cpu":
        cores = torch.get_num_threads()
        return Rates(cores * CPU_CORE[config.precision], cores * CPU_CORE["float32"])
    return Rates(GPU[config.precision], GPU["float32"])


def pass_operations(skeleton: Skeleton, config: PruneConfig, order: Order, kept: float = 1.0) -> float:
    """Operations per token of one pass like those of a recipe: the model, and the sums of the factors.

    Args:
        skeleton: The model.
        config: The recipe.
        order: Layer by layer, blocks are run forward twice.
        kept: Share of the prunable weights that is left.
    """
    how = estimation_of(config)
    model = _model_operations(skeleton, order, kept, backward=how.curvature != "activations")
    return model + kept * _factor_operations(skeleton, how)


def _model_operations(skeleton: Skeleton, order: Order, kept: float, *, backward: bool) -> float:
    """Operations per token of the model in one pass, forward and, if asked for, back without gradients of weights."""
    blocks = kept * skeleton.anatomy.prunable_weights
    rest = skeleton.parameters - skeleton.anatomy.prunable_weights
    again = 2 * blocks if order == "layer-major" and backward else 0.0
    return 2 * (2 if backward else 1) * (rest + blocks) + again


def _passes(config: PruneConfig) -> int:
    """Passes over the tokens in a shot; a layer-wise method goes through each block before and after pruning it."""
    if config.layerwise:
        return 2
    curvature = config.resolved_curvature
    if curvature is None or curvature == "identity":
        return 0
    how = replace(estimation_of(config), curvature=curvature, iterations=config.kronecker_iterations)
    return passes_needed(how, warm=False)


def _factor_operations(skeleton: Skeleton, how: Estimation) -> float:
    """Operations per token of sums of outer products, half of each symmetric one."""
    layers = skeleton.anatomy.layers.values()
    if how.curvature == "diagonal":
        return sum(2.0 * layer.rows * layer.columns for layer in layers)
    inputs = sum(size**2 for size in {layer.input_group: layer.columns for layer in layers}.values())
    gradients = sum(layer.rows**2 for layer in layers) if how.curvature == "kfac" else 0
    return inputs + how.gradient_share * gradients


def phase_seconds(
    skeleton: Skeleton, config: PruneConfig, rates: Rates, evaluated: int, order: Order, processes: int = 1
) -> dict[str, float]:
    """Seconds of each phase, of all shots together.

    Args:
        skeleton: The model.
        config: The recipe, with the tokens of one process.
        rates: Operations per second.
        evaluated: Tokens of the evaluation text.
        order: Of the passes for the curvature.
        processes: How many share out decompositions and the evaluation text.
    """
    tokens = config.samples * config.seq_len
    # What a shot works on is what the one before has left; fitted is what it leaves itself.
    kept = [1.0, *(1 - sparsity for sparsity in config.sparsity_schedule)][:-1]
    left = [1 - sparsity for sparsity in config.sparsity_schedule]
    window = 2 * skeleton.parameters * evaluated / rates.passes / processes
    read = skeleton.weight_bytes / DISK
    operations = sum(pass_operations(skeleton, config, order, k) for k in kept)
    steps = config.steps_per_shot
    speed = SPEED_RUNS * (2 * skeleton.parameters * SPEED_PROMPT / rates.float32)
    speed += SPEED_RUNS * SPEED_DECODED * skeleton.weight_bytes / MEMORY_RATE
    return {
        "load": read,
        "dense evaluation": window,
        "curvature": _passes(config) * tokens * operations / rates.passes,
        "selection": steps * sum(_decompositions(skeleton, config) * k for k in kept) / rates.float32 / processes,
        "update": steps * sum(_updates(skeleton, config) * k for k in kept) / rates.float32 / processes,
        "reconstruction": _reconstructions(skeleton, config, left) * tokens / rates.passes,
        "gates": config.gate_steps * sum(_gate_step(skeleton, order, k) for k in left) * tokens / rates.passes,
        "correction": _corrections(config) * 6 * skeleton.parameters / rates.passes,
        "evaluation": window * config.shots,
        "export and check": 2 * read + RELOAD,
        "speed": speed,
    }


def _reconstructions(skeleton: Skeleton, config: PruneConfig, kept: Sequence[float]) -> float:
    """Operations of the passes of the reconstructions of models with these shares of the weights, per token of text."""
    if not config.reconstruction:
        return 0.0
    prunable = skeleton.anatomy.prunable_weights
    # One run of the pruned model ends behind the attention.
    pruned = PRUNED_RUNS * prunable - _feed_forward_weights(skeleton)
    runs = sum(DENSE_RUNS * prunable + share * pruned for share in kept)
    # Each copy is written once.
    copies = config.reconstruction_copies
    return 2 * ((1 + copies) * runs + skeleton.parameters * copies)


def _gate_step(skeleton: Skeleton, order: Order, kept: float) -> float:
    """Operations of the passes of a step on the gates, per token."""
    back, forward = (_model_operations(skeleton, order, kept, backward=backward) for backward in (True, False))
    return BACKWARD_PASSES * back + FORWARD_PASSES * forward


def _feed_forward_weights(skeleton: Skeleton) -> int:
    """Prunable weights of all blocks behind the first part of each, which is the attention."""
    anatomy = skeleton.anatomy
    first = {part.block: set(part.layers) for part in reversed(anatomy.located)}
    layers = anatomy.layers.items()
    return sum(layer.rows * layer.columns for name, layer in layers if name not in first[layer.block])


def _corrections(config: PruneConfig) -> int:
    """Tokens of the corrections of all shots."""
    steps = config.lora_steps * (config.shots - 1) + config.lora_final_steps
    return steps * config.lora_batch_size * config.seq_len if config.lora else 0


def _decompositions(skeleton: Skeleton, config: PruneConfig) -> float:
    """Operations of all layers' costs: two decompositions with inverses, and two products with the weights."""
    if not _correlated(config):
        return sum(10.0 * layer.rows * layer.columns for layer in skeleton.anatomy.layers.values())
    return sum(
        layer.rows**3 + layer.columns**3 + 2 * layer.rows * layer.columns * (layer.rows + layer.columns)
        for layer in skeleton.anatomy.layers.values()
    )


def _updates(skeleton: Skeleton, config: PruneConfig) -> float:
    """Operations of all layers' updates: a decomposition a side, or steps of conjugate gradients."""
    if not _correlated(config):
        return 0.0
    products = [2 * r * c * (r + c) for r, c in ((x.rows, x.columns) for x in skeleton.anatomy.layers.values())]
    if not config.parts:
        return float(sum(products) * config.update_steps)
    return sum(products) / 4


def _correlated(config: PruneConfig) -> bool:
    return not config.layerwise and config.correlated
