"""The opening of a run: everything that is checked, read and loaded before the first shot.

``prune``, ``prune_checkpoint``, ``compare`` and ``plan`` open their runs here. Each step checks all that it can before
the next step, which costs more.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.data.corpora import Corpus
from llm_surgeon.data.texts import Texts, prepare_texts
from llm_surgeon.errors import DataError
from llm_surgeon.export.formats import check_formats, check_tokenizer
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.classes import check_class
from llm_surgeon.models.loading import load_tokenizer, local_directory, resolve_source
from llm_surgeon.models.permutation import check_residual
from llm_surgeon.models.skeleton import Skeleton, loaded, skeleton_of
from llm_surgeon.models.streaming import require_streaming
from llm_surgeon.planning.forecast import seconds_of_phases
from llm_surgeon.planning.foresee import foresee
from llm_surgeon.planning.memory import WORK
from llm_surgeon.pruning.structures import check_structure
from llm_surgeon.pruning.targets import count_based, latency_based, settled
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.recovery import RecoverConfig
from llm_surgeon.records import Plan
from llm_surgeon.recovery.preparing import check_shares
from llm_surgeon.refit.stages import check_stages, with_dense
from llm_surgeon.run.job import Job, count_parameters
from llm_surgeon.session.given import check_layers_apart
from llm_surgeon.session.preconditions import (
    check_recipe_fits,
    check_stored_type,
    check_texts,
    warn_of_tokenizer,
    warn_of_unknown,
)
from llm_surgeon.session.session import Session
from llm_surgeon.system.processes import ALONE, Processes
from llm_surgeon.system.progress import Progress, SilentProgress, expect
from llm_surgeon.system.storage import Budgets, TensorStore, check_scratch
from llm_surgeon.system.torchrun import Place

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opening:
    """A run on a checkpoint whose configuration is read, but no weight.

    Attributes:
        model: Name of the model, as it was given.
        skeleton: The model without its weights.
        config: The recipe with the sparsity of its target, unless that has to be timed.
        processes: The processes that share the run.
    """

    model: str
    skeleton: Skeleton
    config: PruneConfig
    processes: Processes

    def read_texts(self, digest: str | None = None) -> OpenedTexts:
        """Read and tokenise the texts of the recipe.

        Args:
            digest: Digest that the tokens must have, if there are results with these tokens already.

        Raises:
            DataError: If a text cannot be read or is too short, if the model does not know its tokens, or if the tokens
                do not have the digest.
            ConfigError: If the windows do not fit the text or each other.
        """
        _announce(self.processes, "reading and tokenising the texts")
        settings = self.skeleton.network.config
        tokenizer = load_tokenizer(self.skeleton.source, self.config.trust_remote_code)
        warn_of_tokenizer(settings, tokenizer)
        check_tokenizer(self.config, tokenizer, settings)
        texts = prepare_texts(tokenizer, self.config)
        check_texts(settings, texts)
        warn_of_unknown(tokenizer, texts)
        if digest is not None and texts.digest != digest:
            raise DataError(
                "The calibration or the evaluation text is not what it was when the comparison was begun.",
                "Restore the text, or make a new comparison with another --out.",
            )
        return OpenedTexts(self, tokenizer, texts)


@dataclass(frozen=True)
class OpenedTexts:
    """A run on a checkpoint whose configuration and texts are read, but no weight."""

    opening: Opening
    tokenizer: PreTrainedTokenizerBase
    texts: Texts

    def plan(self, config: PruneConfig, device: torch.device, probe: bool = False, place: Place | None = None) -> Plan:
        """Plan the run.

        Args:
            config: The recipe, with its sparsity.
            device: The device of this process.
            probe: Whether to load the model, and to time and measure one batch.
            place: Place of this process among those that share the run; None if it is the only one.
        """
        opening = self.opening
        _announce(opening.processes, "planning the run")
        return foresee(opening.model, opening.skeleton, config, device, self.texts, probe, place or Place())

    def load(
        self,
        config: PruneConfig,
        device: torch.device,
        progress: Progress | None,
        plan: Plan | None = None,
        command: str | None = None,
    ) -> Job:
        """Load the weights, and begin the session; all checks without weights are done before.

        Args:
            config: The recipe as resolved so far.
            device: The device of this process.
            progress: Display of progress; None shows nothing.
            plan: The plan of the run; None without one.
            command: The command line, for the report.
        """
        opening, processes = self.opening, self.opening.processes
        streamed = plan.streamed if plan else config.weights == "streamed"
        _announce(processes, "loading the weights")
        network, anatomy = loaded(opening.skeleton, config, device, streamed=streamed)
        check_stored_type(network)
        config = processes.from_first(partial(latency_based, config, network, anatomy))
        check_structure(config, anatomy)
        shown = shown_in_first(progress, processes)
        if plan is not None:
            expect(shown, seconds_of_phases(plan, config))
        store = _store(config, plan, device)
        session = Session(network, anatomy, self.texts.calibration, config, shown, store, processes)
        files = local_directory(opening.skeleton.source)
        # The dense copy is made before a checkpoint is restored into the model.
        return Job(with_dense(session), self.tokenizer, self.texts, opening.model, command, plan, files)


def open_checkpoint(model: str, config: PruneConfig, processes: Processes = ALONE, *, weights: bool = True) -> Opening:
    """Read the configuration of a checkpoint, and check that the recipe fits it.

    Args:
        model: A local directory, a hub id, or ``demo``.
        config: The recipe.
        processes: The processes that share the run.
        weights: Whether weights will be read, so that a local directory has to hold them.

    Raises:
        SurgeonError: If something is missing, not supported, or does not fit.
    """
    check_recipe(config, processes)
    _announce(processes, f"reading the configuration of {model}")
    skeleton = skeleton_of(resolve_source(model), config, weights=weights)
    check_recipe_fits(config, skeleton.network.config)
    if config.permute:
        check_residual(skeleton.network, skeleton.anatomy.family)
    config = settled(skeleton, config)
    check_formats(config, skeleton.anatomy, skeleton.network.config)
    return Opening(model, skeleton, config, processes)


def open_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig,
    progress: Progress | None,
    source: str,
    processes: Processes,
    corpus: Corpus | None = None,
) -> Job:
    """Open a run on a model that is in memory.

    Args:
        model: The dense model, which has been checked by ``session.given``.
        tokenizer: Tokenizer of the model.
        config: The recipe.
        progress: Display of progress; None shows nothing.
        source: Name of the model; empty takes the name in its configuration.
        processes: The processes that share the run.
        corpus: The calibration text, if it is in memory; None reads the one that the recipe names.

    Raises:
        SurgeonError: If something is missing, not supported, or does not fit.
    """
    check_recipe(config, processes)
    family = family_of(model.config.model_type)
    check_class(model, family.model_class)
    check_recipe_fits(config, model.config)
    anatomy = examine(model, family, config.ignore)
    check_layers_apart(model, anatomy)
    resolved = count_based(config, anatomy, count_parameters(model), model.dtype.itemsize)
    check_structure(resolved, anatomy)
    check_formats(resolved, anatomy, model.config)
    check_tokenizer(resolved, tokenizer, model.config)
    texts = prepare_texts(tokenizer, config, corpus)
    check_texts(model.config, texts)
    resolved = processes.from_first(partial(latency_based, resolved, model, anatomy))
    check_structure(resolved, anatomy)
    store = _store(resolved, None, next(model.parameters()).device)
    shown = shown_in_first(progress, processes)
    session = Session(model, anatomy, texts.calibration, resolved, shown, store, processes)
    return Job(with_dense(session), tokenizer, texts, source or model.config.name_or_path or type(model).__name__)


def check_recipe(config: PruneConfig, processes: Processes) -> None:
    """Check a recipe against this machine, without a model.

    Raises:
        ConfigError: If an optional package is missing, weights cannot be streamed here, samples are too few, the
            directory for what waits on disk cannot be used, or processes cannot share the steps of the training.
    """
    check_stages(config)
    check_scratch(config.scratch)
    require_streaming(config.weights)
    processes.check_samples(config.samples, config.parts_of_text)
    if config.recover_tokens is not None:
        check_shares(RecoverConfig.of_run(config), processes)


def without_evaluation(opened: OpenedTexts) -> OpenedTexts:
    """The opening without its evaluation text, so that shots are not measured."""
    return replace(opened, texts=Texts(opened.texts.calibration, None))


def shown_in_first(progress: Progress | None, processes: Processes) -> Progress:
    """Progress of the first process, as the other processes' progress is much the same; others show nothing."""
    return progress if progress is not None and processes.first else SilentProgress()


def _store(config: PruneConfig, plan: Plan | None, device: torch.device) -> TensorStore | None:
    """The store for tensors that wait in a run that goes layer by layer; None if it goes batch by batch."""
    if (plan.order if plan else config.order) != "layer-major":
        return None
    limits: dict[str, int | None] = {"disk": config.scratch_space}
    if plan is not None:
        limits = {"host": plan.store_host, "device": plan.store_device, "process": plan.host_available}
        # A GPU's work is not the host's.
        limits["work"] = max(sum(phase.host.get(part, 0) for part in WORK) for phase in plan.phases)
        limits["disk"] = None if config.scratch_space is None else config.scratch_space - plan.scratch_weights
    known = {place: limit for place, limit in limits.items() if limit is not None}
    return TensorStore(device, Budgets(**known), None if config.scratch is None else Path(config.scratch))


def _announce(processes: Processes, words: str) -> None:
    """Log a step that has no progress to count."""
    if processes.first:
        logger.info(words)
