"""The plan of a run, from the configuration of the model and the recipe."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile

import torch

from llm_surgeon.data.texts import Texts
from llm_surgeon.errors import ConfigError
from llm_surgeon.export.formats import loaders, possible
from llm_surgeon.export.quantising import foreseen_fit
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.planning.memory import DENSE_COPY, RECOVERY, PhaseMemory, host_available, weights_on_disk
from llm_surgeon.planning.order import Available, order_name
from llm_surgeon.planning.schedule import Scheduler
from llm_surgeon.planning.seconds import Rates, default_rates, pass_operations, phase_seconds
from llm_surgeon.planning.sizes import dense_size, disk_bytes, kinds_of, size_after, weight_bytes
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import Plan, PlannedPhase
from llm_surgeon.records.summary import scaled_bytes
from llm_surgeon.refit.stages import stages_of
from llm_surgeon.system.memory import available_bytes, in_main_memory
from llm_surgeon.system.torchrun import Place

logger = logging.getLogger(__name__)

_UNSHARED = Place()
# Phases whose memory does not enter the peak of the report.
_UNREPORTED = ("load", "export and check", "speed", RECOVERY)


def foresee(
    model: str,
    skeleton: Skeleton,
    config: PruneConfig,
    device: torch.device,
    texts: Texts,
    probe: bool = False,
    place: Place = _UNSHARED,
) -> Plan:
    """Plan a run whose texts are prepared and whose model is still to be loaded.

    Args:
        model: Name of the model, as it was given.
        skeleton: The model without its weights.
        config: The recipe.
        device: Device of the run, or of one of its processes.
        texts: Texts of the run.
        probe: Whether to time and measure one batch.
        place: Place of one process among those that share the run; the memory of the plan is for each of them.

    Raises:
        ConfigError: If the run needs more memory than the recipe allows.
    """
    for stage in stages_of(config):
        config = stage.resolved(config, skeleton.anatomy)
    config = _part_of(config, place)
    room, rates = room_for(config, device, place), default_rates(config, device)
    course = Scheduler(skeleton, config, device, texts, room, place)
    way = course.way()
    if probe:
        logger.info("loading the model and timing a batch")
        way, probed = course.probed(way)
        rates = _calibrated(rates, pass_operations(skeleton, config, way.order) * probed.tokens / probed.seconds)
    way = course.with_store(way)
    seconds = phase_seconds(skeleton, config, rates, _evaluated(texts), way.order, place.count)
    weights = weights_on_disk(skeleton, config, device) if way.streamed else 0
    scratch = weights + (way.waiting.most_on_disk if way.waiting else 0)
    _check_scratch(config, scratch)
    needs = course.needs(way)
    if RECOVERY in needs:
        _check_recovery(config, needs[RECOVERY])
    last = config.sparsity_schedule[-1]
    settings = skeleton.network.config
    formats = possible(config, skeleton.anatomy, settings)
    return Plan(
        model=model,
        family=skeleton.anatomy.family.model_type,
        device=str(device),
        kinds=kinds_of(skeleton),
        dense_size=dense_size(skeleton),
        size=size_after(skeleton, last),
        dense_weight_bytes=skeleton.weight_bytes,
        weight_bytes=weight_bytes(skeleton, config, last),
        disk=disk_bytes(skeleton, config),
        phases=_phases(needs, seconds),
        host_available=room.host,
        device_available=room.device,
        loaders=loaders(config, settings),
        further=tuple(name for name in formats if name not in config.formats),
        quantising=foreseen_fit(config, skeleton.anatomy, settings) if "gguf" in formats else (),
        probed=probe,
        order=order_name(way.layer_major),
        store_host=None if way.budgets.host == math.inf else round(way.budgets.host),
        store_device=None if way.budgets.device == math.inf else round(way.budgets.device),
        scratch=scratch,
        scratch_weights=weights,
        streamed=way.streamed,
        processes=place.count,
    )


def _check_recovery(config: PruneConfig, need: PhaseMemory) -> None:
    """Check that the training after the last shot is within the recipe's memory: no part of it waits elsewhere.

    Raises:
        ConfigError: If it is not.
    """
    limits = (("--host-memory", config.host_memory, need.host), ("--device-memory", config.device_memory, need.device))
    for option, limit, parts in limits:
        if limit is not None and sum(parts.values()) > limit:
            raise ConfigError(
                f"The training after the last shot (--recover-tokens) needs about {scaled_bytes(sum(parts.values()))}, "
                f"and {option} is {scaled_bytes(limit)}.",
                "Leave --recover-tokens out, and train adapters afterwards: llm-surgeon recover --adapters 16.",
            )


def _check_scratch(config: PruneConfig, scratch: int) -> None:
    """Check that what waits on disk is within the limit of the recipe, and warn if there is less room.

    Raises:
        ConfigError: If it is not.
    """
    if not scratch:
        return
    if config.scratch_space is not None and scratch > config.scratch_space:
        raise ConfigError(
            f"About {scaled_bytes(scratch)} will wait on disk, and --scratch-space is "
            f"{scaled_bytes(config.scratch_space)}.",
            "Raise it, or give the run more memory (--host-memory, --device-memory).",
        )
    directory = config.scratch or tempfile.gettempdir()
    if in_main_memory(directory):
        logger.warning("%s is in main memory (tmpfs): what waits there counts as memory", directory)
    free = shutil.disk_usage(directory).free
    if scratch > free:
        logger.warning(
            "about %.1f GiB will wait on disk, and %s has room for %.1f GiB: give another directory as --scratch",
            scratch / 2**30,
            directory,
            free / 2**30,
        )


def _part_of(config: PruneConfig, place: Place) -> PruneConfig:
    """The recipe of one process, with its part of the tokens and of the machine's memory."""
    memory = None if config.host_memory is None else config.host_memory // place.local_count
    own = math.ceil(config.samples / place.count)
    batch = min(own, config.sequences_per_pass)
    return config.model_copy(update={"samples": own, "batch_size": batch, "host_memory": memory})


def room_for(config: PruneConfig, device: torch.device, place: Place = _UNSHARED) -> Available:
    """Bytes that are free for one process, or that its part of the recipe allows.

    Raises:
        ConfigError: If the recipe limits the memory of a GPU, and the run is on the CPU.
    """
    if config.device_memory is not None and device.type == "cpu":
        raise ConfigError("device_memory is for a GPU, and the run is to be on the CPU.", "Use --host-memory.")
    on_gpu = config.device_memory
    if on_gpu is None and device.type == "cuda":
        on_gpu = available_bytes(device)
    return Available(config.host_memory or host_available() // place.local_count, on_gpu)


def warn_if_short(foreseen: Plan) -> None:
    """Warn if there is less memory than the plan needs, with the largest part and a remedy."""
    places = [("memory", foreseen.host_available, [phase.host for phase in foreseen.phases])]
    if foreseen.device_available is not None:
        places.append((f"memory of {foreseen.device}", foreseen.device_available, [p.device for p in foreseen.phases]))
    for place, available, phases in places:
        parts = max(phases, key=lambda phase: sum(phase.values()))
        if sum(parts.values()) > available:
            largest = max(parts, key=lambda part: parts[part])
            logger.warning(
                "about %.1f GiB of %s will be needed, and %.1f GiB are free; the largest part is %s with %.1f GiB: %s",
                sum(parts.values()) / 2**30,
                place,
                available / 2**30,
                largest,
                parts[largest] / 2**30,
                _remedy(largest, DENSE_COPY in parts),
            )


def _remedy(part: str, reconstructs: bool) -> str:
    if reconstructs and part in ("weights", DENSE_COPY):
        return "leave out what holds the dense model beside the pruned one (--no-reconstruction, or a name of --stage)"
    if part.startswith("hidden states"):
        return "set --host-memory, so that less of it waits in memory and more on disk"
    if part in ("passes", "allocator", "freed logits"):
        return "use a smaller --batch-size or --seq-len"
    if part == "weights, gradients and moments":
        return "leave --recover-tokens out, and train adapters afterwards (llm-surgeon recover --adapters 16)"
    if part == "factors":
        return "use --order layer-major or auto, leave layers out with --ignore, or use a layer-wise method"
    return "use --dtype bfloat16, a smaller --batch-size, or a machine with more memory"


def _calibrated(rates: Rates, passes: float) -> Rates:
    """Rates with the speed of passes from a probe; the speed of decompositions changes by the same factor."""
    return Rates(passes, rates.float32 * passes / rates.passes)


def _evaluated(texts: Texts) -> int:
    """Number of tokens of all windows of the evaluation text."""
    return 0 if texts.evaluation is None else len(texts.evaluation.windows) * texts.evaluation.window


def _phases(needs: dict[str, PhaseMemory], seconds: dict[str, float]) -> tuple[PlannedPhase, ...]:
    return tuple(
        PlannedPhase(
            name=name, host=need.host, device=need.device, seconds=seconds[name], reports=name not in _UNREPORTED
        )
        for name, need in needs.items()
    )
