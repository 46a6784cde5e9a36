"""Sequences of tokens to train on: the windows of one or several texts, over and over, each time in another order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_surgeon.data.corpora import Corpus
from llm_surgeon.data.texts import CALIBRATION, part_of
from llm_surgeon.data.tokenising import token_ids
from llm_surgeon.data.tokens import first_token
from llm_surgeon.errors import ConfigError, DataError
from llm_surgeon.recipe.config import Bos
from llm_surgeon.recipe.quantity import shown
from llm_surgeon.recipe.sources import Source, allotted


@dataclass(frozen=True)
class SourceUse:
    """How often a text is read.

    Attributes:
        source: The text in words.
        tokens: Its tokens.
        sequences: Number of sequences that are of it.
        passes: Number of times that it is read.
    """

    source: str
    tokens: int
    sequences: int
    passes: float


@dataclass(frozen=True)
class TrainingTokens:
    """Sequences in the order of the training.

    Attributes:
        input_ids: int64 ``[sequences, seq_len]``, without padding.
        sources: The texts.
    """

    input_ids: Tensor
    sources: tuple[SourceUse, ...]


def training_tokens(
    tokenizer: PreTrainedTokenizerBase,
    sources: tuple[Source, ...],
    split: frozenset[str],
    *,
    sequences: int,
    seq_len: int,
    seed: int,
    bos: Bos = "auto",
    given: Mapping[str, Corpus] = MappingProxyType({}),
) -> TrainingTokens:
    """Read and tokenise texts to train on, and cut them into sequences.

    Each text is cut into windows that follow one another. A pass has all windows in random order, and the next pass
    begins its windows at another token. Sequences of several texts are spread evenly, by the texts' shares.

    Args:
        tokenizer: Tokenizer of the model.
        sources: The texts, with their shares of the sequences.
        split: Names of the texts whose last tenth is held out.
        sequences: Number of sequences of all texts together.
        seq_len: Tokens per sequence.
        seed: Seed of the order.
        bos: Whether sequences begin with the token that begins a text, see ``first_token``.
        given: Texts that have been read already, whole, by their names.

    Raises:
        DataError: If a text cannot be read, or is shorter than a sequence.
        ConfigError: If there are fewer sequences than a text's share has to have.
    """
    first, parts, uses = first_token(tokenizer, bos), list[Tensor](), list[SourceUse]()
    for number, (source, count) in enumerate(zip(sources, allotted(sources, sequences), strict=True)):
        if not count:
            raise ConfigError(
                f"{sequences:,} sequences leave none for {shown(source.text)}, whose share is {source.share:.3g}.",
                "Raise --tokens, or the share.",
            )
        corpus = part_of(source.text, CALIBRATION, split=source.text in split, given=given.get(source.text))
        corpus = corpus.rendered(tokenizer)
        window = seq_len - (first is not None)
        ids = _enough(token_ids(tokenizer, corpus.text, special=first is None), corpus, window)
        generator = torch.Generator().manual_seed((seed + number) % 2**63)
        own = torch.stack([ids[start : start + window] for start in _starts(len(ids), window, count, generator)])
        parts.append(own if first is None else torch.cat([torch.full((count, 1), first), own], dim=1))
        uses.append(SourceUse(corpus.source, len(ids), count, count * window / len(ids)))
    # The sequence i of n of a text stands at (i + 1/2) / n of the whole.
    places = torch.cat([(torch.arange(len(part)) + 0.5) / len(part) for part in parts])
    return TrainingTokens(torch.cat(parts)[places.argsort(stable=True)], tuple(uses))


def _starts(tokens: int, window: int, count: int, generator: torch.Generator) -> list[int]:
    """First tokens of the windows of a text, pass after pass."""
    found: list[int] = []
    for shift in _shifts(tokens, window, generator):
        if len(found) >= count:
            break
        starts = torch.arange(shift, tokens - window + 1, window)
        found += starts[torch.randperm(len(starts), generator=generator)].tolist()
    return found[:count]


def _shifts(tokens: int, window: int, generator: torch.Generator) -> Iterator[int]:
    """First token of each pass: 0, and then any at which no window is lost that need not be."""
    yield 0
    while True:
        yield int(torch.randint(tokens % window + 1, (1,), generator=generator))


def _enough(ids: Tensor, corpus: Corpus, window: int) -> Tensor:
    if len(ids) < window:
        raise DataError(
            f"The text {corpus.source} has {len(ids):,} tokens, fewer than one sequence of {window:,}.",
            "Give a longer text, or lower --seq-len.",
        )
    return ids
