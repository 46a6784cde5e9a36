"""Rough seconds of the phases of a run: operations counted from shapes, divided by a rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_surgeon.curvature import ESTIMATORS, estimator_of
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.passes.batch_major import Order
from llm_surgeon.passes.operations import model_operations
from llm_surgeon.planning.memory import RECOVERY
from llm_surgeon.planning.sizes import stored_parameters
from llm_surgeon.planning.trace import traced_estimation
from llm_surgeon.pruning.loops import loop_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.refit.stages import stages_of

# Operations per second of one CPU core with matrix units, and of a data centre's GPU.
CPU_CORE = {"bfloat16": 1.0e11, "float32": 0.5e11}
GPU = {"bfloat16": 2.0e14, "float32": 0.3e14}
# Bytes per second from and to a disk.
DISK = 5e8
# Seconds of the fresh process of the reload check, beside reading the weights.
RELOAD = 10.0
# Workload of the speed comparison: six runs of either model, tokens of the prompt, and decoded tokens, each of which
# reads all weights at this rate.
SPEED_RUNS, SPEED_PROMPT, SPEED_DECODED, MEMORY_RATE = 12, 512, 32, 1e10


@dataclass(frozen=True)
class Rates:
    """Operations per second of passes in the recipe's arithmetic, and of float32 decompositions."""

    passes: float
    float32: float


def default_rates(config: PruneConfig, device: torch.device) -> Rates:
    """Rates of a common machine with as many cores as this one, or of a common GPU."""
    if device.type == "cpu":
        cores = torch.get_num_threads()
        return Rates(cores * CPU_CORE[config.precision], cores * CPU_CORE["float32"])
    return Rates(GPU[config.precision], GPU["float32"])


def pass_operations(skeleton: Skeleton, config: PruneConfig, order: Order, kept: float = 1.0) -> float:
    """Operations per token of one pass of a recipe: of the model, and of the sums of the factors.

    Args:
        skeleton: The model.
        config: The recipe.
        order: Order of the pass; in a layer-major pass blocks are run forward twice.
        kept: Share of the prunable weights that is left.
    """
    how = traced_estimation(config)
    estimator = ESTIMATORS[how.curvature]
    model = model_operations(skeleton, order, kept, backward=estimator.backward)
    return model + kept * estimator.operations(skeleton.anatomy.layers.values(), how)


def phase_seconds(
    skeleton: Skeleton, config: PruneConfig, rates: Rates, evaluated: int, order: Order, processes: int = 1
) -> dict[str, float]:
    """Seconds of each phase, of all shots together.

    Args:
        skeleton: The model.
        config: The recipe, with the tokens of one process.
        rates: Operations per second.
        evaluated: Number of tokens of the evaluation text.
        order: Order of the passes for the curvature.
        processes: Number of processes that share out decompositions and the evaluation text.
    """
    tokens = config.samples * config.seq_len
    # A shot works on the weights that the shot before has left. Its stages fit the weights that it leaves itself.
    kept = [1.0, *(1 - sparsity for sparsity in config.sparsity_schedule)][:-1]
    left = [1 - sparsity for sparsity in config.sparsity_schedule]
    window = 2 * skeleton.parameters * evaluated / rates.passes / processes
    read = skeleton.weight_bytes / DISK
    operations = sum(pass_operations(skeleton, config, order, k) for k in kept)
    steps = config.steps_per_shot
    speed = SPEED_RUNS * (2 * skeleton.parameters * SPEED_PROMPT / rates.float32)
    speed += SPEED_RUNS * SPEED_DECODED * skeleton.weight_bytes / MEMORY_RATE
    trained = stored_parameters(skeleton, config, config.sparsity) if config.recover_tokens else 0
    # A pass of the teacher, and three of what is trained.
    recovery = (config.recover_tokens or 0) * (2 * skeleton.parameters + 6 * trained) / processes
    return {
        "load": read,
        "dense evaluation": window,
        "curvature": loop_of(config).passes(config) * tokens * operations / rates.passes,
        "selection": steps * sum(_decompositions(skeleton, config) * k for k in kept) / rates.float32 / processes,
        "update": steps * sum(_updates(skeleton, config) * k for k in kept) / rates.float32 / processes,
        **{stage.name: stage.operations(skeleton, config, left, order) / rates.passes for stage in stages_of(config)},
        "evaluation": window * config.shots,
        "export and check": 2 * read + RELOAD,
        "speed": speed,
        RECOVERY: recovery / rates.passes,
    }


def _decompositions(skeleton: Skeleton, config: PruneConfig) -> float:
    """Operations of all layers' costs: two decompositions with inverses, and two products with the weights."""
    if not _correlated(config):
        return sum(10.0 * layer.rows * layer.columns for layer in skeleton.anatomy.layers.values())
    return sum(
        layer.rows**3 + layer.columns**3 + 2 * layer.rows * layer.columns * (layer.rows + layer.columns)
        for layer in skeleton.anatomy.layers.values()
    )


def _updates(skeleton: Skeleton, config: PruneConfig) -> float:
    """Operations of all layers' updates: a decomposition for each side, or steps of conjugate gradients."""
    if not _correlated(config):
        return 0.0
    products = [2 * r * c * (r + c) for r, c in ((x.rows, x.columns) for x in skeleton.anatomy.layers.values())]
    if not config.parts:
        return float(sum(products) * config.update_steps)
    return sum(products) / 4


def _correlated(config: PruneConfig) -> bool:
    return estimator_of(config) is not None and config.correlated
