"""Targets in place of a sparsity: parameters, bytes of the weight files, milliseconds of a pass."""

from __future__ import annotations

import copy
import logging
from itertools import accumulate, pairwise

from transformers import PreTrainedModel

from llm_surgeon.errors import ConfigError
from llm_surgeon.evaluation.speed import Workload, measure_speed
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.matrix import cut_out
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.pruning.shapes import Shapes
from llm_surgeon.pruning.structures import check_structure
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import TargetRecord

logger = logging.getLogger(__name__)

# Number of tokens of the pass that a latency target is for.
TOKENS = 512
# Shares of the removable weights at which copies of the model are timed.
_TIMED_AT = (0.0, 0.3, 0.6, 0.9)
_REPEATS = 5
# A latency above the target times this gives a warning; timings vary by as much.
_LATENCY_TOLERANCE = 1.05
# A size above the target times this gives a warning; a threshold may miss by a part of the largest candidate.
_COUNT_TOLERANCE = 1.01


def count_based(config: PruneConfig, anatomy: Anatomy, total: int, itemsize: int) -> PruneConfig:
    """The recipe with the sparsity for its target in parameters or bytes; unchanged if it has no such target.

    Biases that go with their rows are not counted, so the result is a little below the target.

    Args:
        config: The recipe.
        anatomy: Layers of the model.
        total: Number of parameters of the dense model, tied ones counted once.
        itemsize: Bytes of a parameter.

    Raises:
        ConfigError: If the dense model meets the target, or the parameters that cannot be removed exceed it.
    """
    if config.target_params is not None:
        wanted, what = config.target_params, f"{config.target_params:,} parameters"
    elif config.target_bytes is not None:
        wanted, what = config.target_bytes // itemsize, f"{config.target_bytes:,} bytes"
    else:
        return config
    fixed = total - anatomy.prunable_weights
    if wanted >= total:
        raise ConfigError(f"The dense model is not larger than {what}.", "Ask for less, or give --sparsity.")
    if wanted <= fixed:
        raise ConfigError(
            f"Embeddings, norms and what is ignored are {fixed:,} parameters, so that {what} cannot be reached.",
            f"Ask for more than {max(fixed, fixed * itemsize if config.target_bytes else 0):,}.",
        )
    return _announced(config, what, 1 - (wanted - fixed) / anatomy.prunable_weights)


def latency_based(config: PruneConfig, model: PreTrainedModel, anatomy: Anatomy) -> PruneConfig:
    """The recipe with the sparsity for its target in milliseconds; unchanged if it has no such target.

    Copies of the model with random removals of the structure are timed at a few sizes. Between these sizes, the time
    counts as linear in the sparsity. The timing needs memory for one copy.

    Raises:
        ConfigError: If the dense model is fast enough, or even the smallest copy is too slow.
    """
    if config.target_latency is None:
        return config
    most = 1 - Shapes(config, anatomy).least_weights() / anatomy.prunable_weights
    sparsities = [share * most for share in _TIMED_AT]
    # A smaller copy does not take longer. A larger time means that something else kept the machine busy.
    timed = accumulate((_time(model, anatomy, config, sparsity) for sparsity in sparsities), min)
    points = list(zip(sparsities, timed, strict=True))
    timings = ", ".join(f"{1000 * seconds:.1f} ms at {100 * sparsity:.0f} %" for sparsity, seconds in points)
    logger.info("a pass over %d tokens: %s", TOKENS, timings)
    what = f"{config.target_latency:g} ms"
    wanted = config.target_latency / 1000
    if wanted >= points[0][1]:
        raise ConfigError(f"The dense model is not slower than {what} ({timings}).", "Ask for less.")
    for (sparse, slow), (sparser, fast) in pairwise(points):
        if fast <= wanted <= slow:
            return _announced(config, what, sparse + (sparser - sparse) * (slow - wanted) / max(slow - fast, 1e-9))
    raise ConfigError(f"{what} cannot be reached by removing {config.structure} ({timings}).", "Ask for more.")


def _announced(config: PruneConfig, what: str, sparsity: float) -> PruneConfig:
    logger.info("%s: a sparsity of %.4f", what, sparsity)
    return config.at(sparsity)


def _time(model: PreTrainedModel, anatomy: Anatomy, config: PruneConfig, sparsity: float) -> float:
    """Seconds of a pass over a copy of the model with random removals."""
    if not sparsity:
        return seconds_of(model)
    keep = Shapes(config, anatomy).random_masks(sparsity, seed=0)
    smaller = copy.deepcopy(model)
    cut_out(smaller, anatomy, keep)
    return seconds_of(smaller)


def seconds_of(model: PreTrainedModel) -> float:
    """Seconds of a pass over ``TOKENS`` tokens, or as many as the model has positions for."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TOKENS + 1
    tokens = min(TOKENS, longest - 1)
    return tokens / measure_speed(model, Workload(tokens, generate=1, repeats=_REPEATS)).prefill


def reached(config: PruneConfig, model: PreTrainedModel, parameters: int, weight_bytes: int) -> TargetRecord | None:
    """Record of a target and of the value that was reached; None if the recipe has no target.

    Args:
        config: The recipe as it was given.
        model: The pruned model.
        parameters: Number of parameters of the pruned model.
        weight_bytes: Bytes of the weight files of its export.
    """
    if config.target is None:
        return None
    found = {
        "target_params": lambda: float(parameters),
        "target_bytes": lambda: float(weight_bytes),
        "target_latency": lambda: 1000 * seconds_of(model),
    }[config.target]()
    wanted = float(getattr(config, config.target))
    tolerance = _LATENCY_TOLERANCE if config.target == "target_latency" else _COUNT_TOLERANCE
    if found > tolerance * wanted:
        logger.warning("%s is %g, and %g was asked for", config.target, found, wanted)
    return TargetRecord(target=config.target, wanted=wanted, reached=found)


def settled(skeleton: Skeleton, config: PruneConfig) -> PruneConfig:
    """The recipe with the sparsity for its target, unless the target has to be timed; checked with the layers.

    Raises:
        ConfigError: If the layers do not allow the structure, or the target cannot be reached.
    """
    resolved = count_based(config, skeleton.anatomy, skeleton.parameters, skeleton.dtype.itemsize)
    check_structure(resolved, skeleton.anatomy)
    return resolved
