"""Quality and size of several models on the same tokens."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.data.corpora import load_corpus
from llm_surgeon.data.texts import evaluation_text
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.errors import ConfigError
from llm_surgeon.evaluation.divergence import perplexity_and_divergence, reference_states
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.export.save import weight_bytes
from llm_surgeon.models.loading import check_dtype, load, load_tokenizer, resolve_device, resolve_source
from llm_surgeon.models.trust import has_weights
from llm_surgeon.passes.head import Head
from llm_surgeon.recipe.config import Bos
from llm_surgeon.records import ExportComparison, ExportMeasures, Perplexity
from llm_surgeon.run.job import count_parameters
from llm_surgeon.session.given import check_model, ready
from llm_surgeon.session.preconditions import check_positions, check_tokens
from llm_surgeon.system.progress import Progress, SilentProgress
from llm_surgeon.versions import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Reference:
    """The first model's predictions: its head, and its last hidden states ``[tokens, width]`` of each text."""

    head: Head
    vocabulary: int
    states: list[Tensor]


def compare_exports(
    models: Sequence[str | Path],
    data: Sequence[str] = ("demo",),
    *,
    window: int = 1024,
    max_tokens: int = 20_480,
    bos: Bos = "auto",
    precision: str = "bfloat16",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> ExportComparison:
    """Measure models on the same tokens: perplexity, and divergence from the first of them.

    The models are loaded one after the other.

    Args:
        models: Exports, local directories, hub ids, or ``demo``, whose tokenizers give the same tokens.
        data: Texts, each as ``load_corpus`` takes it; of the demo text, the part that calibration never sees.
        window: Tokens per window.
        max_tokens: Tokens of each text, at most.
        bos: Whether each window begins with the token that begins a text: ``auto``, ``always`` or ``never``.
        precision: ``bfloat16`` or ``float32`` arithmetic.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: Whether code of checkpoints may run that are no exports of this package.
        progress: Display of the progress; None shows nothing.
        command: The command as it was typed, for the record.

    Raises:
        ConfigError: If there are fewer than two models or no text, or the tokenizers give different tokens.
        DataError: If a text cannot be read, or has tokens that a model does not know.
        ModelError: If a model cannot be loaded.
        NonFiniteError: If a model's loss is not finite.
    """
    if isinstance(models, str) or isinstance(data, str):
        raise ConfigError("A text stands where a list is to be.", "Give lists of models and of texts.")
    names = [str(model) for model in models]
    if len(names) < 2 or not data:
        raise ConfigError("Two models and a text are the least that can be compared.", "Name more of them.")
    check_dtype(dtype)
    resolve_device(device)
    texts = _texts(names, data, window, max_tokens, precision, bos, trust_remote_code)
    found, display = list[ExportMeasures](), progress or SilentProgress()
    reference: _Reference | None = None
    pairs: list[tuple[Perplexity, float | None]]
    for name in names:
        logger.info("loading %s", name)
        network, _ = load(name, dtype, device, trust_remote_code)
        check_model(network)
        check_positions(network.config, {"window": window})
        check_tokens(network.config, [text.tokens for text in texts])
        with ready(network):
            if reference is None:
                reference, measured = _first(network, texts, display, name)
                pairs = [(one, None) for one in measured]
            else:
                pairs = _against(reference, network, texts, display, name)
            found.append(_measures(name, network, pairs))
        # The next model may need the memory.
        del network
        gc.collect()
    return ExportComparison(models=tuple(found), command=command, versions=versions())


def _texts(
    names: Sequence[str],
    data: Sequence[str],
    window: int,
    max_tokens: int,
    precision: str,
    bos: Bos,
    trust_remote_code: bool,
) -> list[EvaluationText]:
    """Tokens of each text, which all tokenizers have to agree on.

    Raises:
        ConfigError: If they do not.
        DataError: If a text cannot be read.
    """
    corpora, first = [load_corpus(spec) for spec in data], list[EvaluationText]()
    for name in names:
        tokenizer = load_tokenizer(resolve_source(name), trust_remote_code)
        own = [
            evaluation_text(
                tokenizer,
                spec,
                window=window,
                stride=None,
                max_tokens=max_tokens,
                precision=precision,
                bos=bos,
                given=corpus,
            )
            for spec, corpus in zip(data, corpora, strict=True)
        ]
        first = first or own
        if not all(torch.equal(one.tokens, other.tokens) for one, other in zip(first, own, strict=True)):
            raise ConfigError(
                f"{name} and {names[0]} make different tokens of the text, so that their perplexities cannot be "
                "compared.",
                "Compare models with the same tokenizer.",
            )
    return first


def _first(
    network: PreTrainedModel, texts: Sequence[EvaluationText], progress: Progress, name: str
) -> tuple[_Reference, list[Perplexity]]:
    """Predictions and perplexities of the model that the others are compared with."""
    with progress.phase(f"{name}: perplexity", sum(text.work for text in texts)) as phase:
        measured = [reference_states(network, text, phase.advance) for text in texts]
    vocabulary = network.get_output_embeddings().weight.shape[0]
    reference = _Reference(Head(network, own_copy=True), vocabulary, [states for _, states in measured])
    return reference, [one for one, _ in measured]


def _against(
    reference: _Reference, network: PreTrainedModel, texts: Sequence[EvaluationText], progress: Progress, name: str
) -> list[tuple[Perplexity, float | None]]:
    """Perplexities of a model and its divergences from the first, which are None with another vocabulary."""
    found = list[tuple[Perplexity, float | None]]()
    same = network.get_output_embeddings().weight.shape[0] == reference.vocabulary
    with progress.phase(f"{name}: perplexity and divergence", sum(text.work for text in texts)) as phase:
        for text, states in zip(texts, reference.states, strict=True):
            if same:
                found.append(perplexity_and_divergence(network, text, states, phase.advance, reference.head))
            else:
                found.append((perplexity(network, text, phase.advance), None))
    return found


def _measures(
    name: str, network: PreTrainedModel, measured: Sequence[tuple[Perplexity, float | None]]
) -> ExportMeasures:
    """Record of one model."""
    return ExportMeasures(
        model=name,
        parameters=count_parameters(network),
        weight_bytes=_weight_bytes(Path(resolve_source(name))),
        perplexities=tuple(one for one, _ in measured),
        divergences=tuple(divergence for _, divergence in measured),
    )


def _weight_bytes(source: Path) -> int | None:
    """Bytes of the weight files of a directory; None if it is not on this machine."""
    if not source.is_dir() or not has_weights(source):
        return None
    # Some checkpoints hold the same weights once more under names of their own.
    return sum(path.stat().st_size for path in source.glob("model*.safetensors")) or weight_bytes(source)
