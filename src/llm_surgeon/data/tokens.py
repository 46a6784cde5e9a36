"""Blocks of tokens made from text: calibration windows drawn at random, and one sequence to evaluate on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llm_surgeon.data.corpora import Corpus
from llm_surgeon.data.tokenising import token_ids
from llm_surgeon.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_surgeon.recipe.config import Bos

SAMPLING_RULE = (
    "random.Random(seed).sample(range(0, tokens - window), samples * windows_per_sample), where window is seq_len / "
    "windows_per_sample, gives the first token of each window; those of a sample follow one another; with bos, it "
    "stands before each window, which has one token of the text less"
)


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """Token sequences to estimate curvature on, with their provenance.

    Attributes:
        input_ids: int64, shape [samples, seq_len].
        attention_mask: bool, shape [samples, seq_len], True where the token is real; None where nothing is padding.
        provenance: All that is needed to draw the same tokens again; holds JSON values only.
        first: Number of the first sequence in the whole set, of which these may be a part.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    provenance: dict[str, Any]
    first: int = 0

    def __post_init__(self) -> None:
        """Check shapes and types.

        Raises:
            DataError: If ``input_ids`` or ``attention_mask`` has the wrong shape or type, or all tokens are padding.
        """
        ids, mask = self.input_ids, self.attention_mask
        if ids.dtype != torch.int64 or ids.ndim != 2 or ids.numel() == 0:
            raise DataError(
                f"Calibration input_ids are {ids.dtype} of shape {tuple(ids.shape)}.",
                "Give a non-empty int64 tensor of shape [samples, seq_len].",
            )
        if mask is None:
            return
        if mask.dtype != torch.bool or mask.shape != ids.shape:
            raise DataError(
                f"The attention mask is {mask.dtype} of shape {tuple(mask.shape)}.",
                f"Give a bool tensor of shape {tuple(ids.shape)}, True for real tokens, or None.",
            )
        if not mask.any():
            raise DataError("The attention mask calls every token padding.", "Use True for real tokens.")

    @property
    def n_samples(self) -> int:
        """Number of sequences."""
        return self.input_ids.shape[0]

    @property
    def seq_len(self) -> int:
        """Tokens per sequence, padding included."""
        return self.input_ids.shape[1]

    @property
    def n_tokens(self) -> int:
        """Number of real tokens, padding left out."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    def part(self, rows: slice) -> CalibrationTokens:
        """Part of the sequences; the slice has a start and a step of one."""
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        return CalibrationTokens(self.input_ids[rows], mask, self.provenance, self.first + rows.start)

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Cut the sequences into batches, in order; the last one may be smaller.

        Args:
            batch_size: Sequences per batch, at least 1.

        Yields:
            ``input_ids`` [batch, seq_len] and the ``attention_mask`` of the same shape, or None.

        Raises:
            DataError: If ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise DataError(f"The batch size is {batch_size}.", "Use a batch size of at least 1.")
        for start in range(0, self.n_samples, batch_size):
            rows = slice(start, start + batch_size)
            yield self.input_ids[rows], None if self.attention_mask is None else self.attention_mask[rows]


def sample_calibration(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    samples: int,
    seq_len: int,
    seed: int,
    windows_per_sample: int = 1,
    bos: int | None = None,
) -> CalibrationTokens:
    """Draw calibration windows at random places of the corpus, which is tokenised as one sequence.

    The windows may overlap, but no two start at the same token. With several windows one behind the other in a sample,
    long sequences show as many places of the text as short ones would.

    Args:
        tokenizer: Tokenizer of the model.
        corpus: Text to draw from.
        samples: Number of sequences.
        seq_len: Tokens per sequence.
        seed: Seed of the draw; equal to ``random.seed(seed); random.sample(...)``, without touching the global state.
        windows_per_sample: Windows that make up a sequence.
        bos: Token to begin each window with, see ``first_token``; None for no such token.

    Returns:
        The sequences, ``input_ids`` [samples, seq_len], without padding.

    Raises:
        DataError: If the corpus has fewer tokens than ``samples * seq_len``, or too few for so many windows, or the
            windows of a sequence cannot be of equal length.
    """
    if samples < 1 or seq_len < 1:
        raise DataError(f"{samples} samples of {seq_len} tokens were asked for.", "Ask for at least one of each.")
    if windows_per_sample < 1 or seq_len % windows_per_sample:
        raise DataError(
            f"{seq_len} tokens cannot be {windows_per_sample} windows of equal length.",
            "Choose a number of windows that divides seq_len.",
        )
    windows, window = samples * windows_per_sample, seq_len // windows_per_sample - (bos is not None)
    if not window:
        raise DataError("A window of one token has room for its beginning only.", "Choose a larger seq_len.")
    corpus = corpus.rendered(tokenizer)
    # Windows that begin with BOS hold no other tokens that the tokenizer adds.
    ids = token_ids(tokenizer, corpus.text, special=bos is None)
    # Each window needs a first token of its own, so the smallest requests need a little more than their product.
    needed = max(windows * window, window + windows)
    if len(ids) < needed:
        raise DataError(
            f"The calibration text {corpus.source} has {len(ids):,} tokens; "
            f"{samples:,} samples of {seq_len:,} tokens need {needed:,}.",
            "Give a longer text, or lower samples or seq_len.",
        )
    starts = random.Random(seed).sample(range(0, len(ids) - window), windows)
    provenance = {
        "source": corpus.source,
        "sha256": corpus.sha256,
        "documents": len(corpus.documents),
        "characters": len(corpus.text),
        "tokens_available": len(ids),
        "samples": samples,
        "seq_len": seq_len,
        "windows_per_sample": windows_per_sample,
        "seed": seed,
        "bos": bos,
        "sampling": SAMPLING_RULE,
    }
    drawn = _begun([ids[start : start + window] for start in starts], bos).view(samples, seq_len)
    return CalibrationTokens(input_ids=drawn, attention_mask=None, provenance=provenance)


def mixed(drawn: Sequence[CalibrationTokens], shares: Sequence[float]) -> CalibrationTokens:
    """Sequences of several texts as one set, in an order in which every part of the set has each text.

    Two sequences of a text follow one another, as halves of the set are its even and its odd sequences, and the pairs
    are spread evenly, as processes take consecutive sequences.

    Args:
        drawn: Sequences of each text.
        shares: Share of each text, for the record.
    """
    if len(drawn) == 1:
        return drawn[0]
    parts = [tokens.input_ids for tokens in drawn]
    pairs = sorted(
        ((start + 1) / len(ids), text, start) for text, ids in enumerate(parts) for start in range(0, len(ids) - 1, 2)
    )
    # Of an odd number of sequences one is left.
    alone = [ids[-1:] for ids in parts if len(ids) % 2]
    together = torch.cat([*(parts[text][start : start + 2] for _, text, start in pairs), *alone])
    common = ("seq_len", "windows_per_sample", "seed", "bos", "sampling")
    texts = [
        {"share": share} | {name: value for name, value in tokens.provenance.items() if name not in common}
        for share, tokens in zip(shares, drawn, strict=True)
    ]
    shared = {name: drawn[0].provenance[name] for name in common}
    return CalibrationTokens(together, None, {"samples": len(together), **shared, "texts": texts})


def evaluation_tokens(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, window: int, max_tokens: int) -> torch.Tensor:
    """Take the first tokens of the corpus, which is tokenised as one sequence.

    Args:
        tokenizer: Tokenizer of the model.
        corpus: Text to evaluate on.
        window: Tokens per evaluation window; at least one must fit.
        max_tokens: Tokens to take, at most.

    Returns:
        Token ids, int64, shape [tokens].

    Raises:
        DataError: If there are fewer tokens than one window, in the text or in ``max_tokens``.
    """
    corpus = corpus.rendered(tokenizer)
    return _enough(token_ids(tokenizer, corpus.text, special=True, most=max_tokens), corpus, window, max_tokens)


def windows_with_bos(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, window: int, stride: int, max_tokens: int, bos: int
) -> torch.Tensor:
    """Cut the beginning of the corpus, which is tokenised as one sequence, into windows that each begin with BOS.

    Args:
        tokenizer: Tokenizer of the model.
        corpus: Text to evaluate on.
        window: Tokens per window; the first is BOS, the others are of the text.
        stride: Tokens of the text from one window's start to the next one's; one less if it is the window.
        max_tokens: Tokens in all, at most, as if the windows were cut without BOS.
        bos: The token BOS.

    Returns:
        Token ids of all windows one behind the other, int64, shape [windows * window].

    Raises:
        DataError: If there are fewer tokens than one window, in the text or in ``max_tokens``.
    """
    corpus = corpus.rendered(tokenizer)
    ids = token_ids(tokenizer, corpus.text, special=False, most=max_tokens)
    ids = _enough(ids, corpus, window - 1, max_tokens)
    most, step = (max_tokens - window) // stride + 1, min(stride, window - 1)
    starts = range(0, len(ids) - window + 2, step)[:most]
    return _begun([ids[start : start + window - 1] for start in starts], bos)


def first_token(tokenizer: PreTrainedTokenizerBase, bos: Bos) -> int | None:
    """Token that each window has to begin with; None if windows hold tokens of the text only.

    Args:
        tokenizer: Tokenizer of the model.
        bos: ``always``, ``never``, or ``auto``: wherever the tokenizer puts one before a text, because models that were
            trained so are far off without it.

    Raises:
        ConfigError: If the tokenizer has no such token and ``bos`` is ``always``, or ``bos`` is none of the three.
    """
    if bos not in ("auto", "always", "never"):
        raise ConfigError(f"--bos is {bos!r}.", "Use auto, always or never.")
    token = tokenizer.bos_token_id
    if bos == "always" and not isinstance(token, int):
        raise ConfigError("The tokenizer has no token that begins a text.", "Leave --bos out.")
    if bos == "never" or not isinstance(token, int):
        return None
    # The tokens of an empty text are those that the tokenizer adds.
    return token if bos == "always" or tokenizer("").input_ids[:1] == [token] else None


def _begun(windows: list[torch.Tensor], bos: int | None) -> torch.Tensor:
    """Join windows one behind the other, each begun with the token ``bos``, if there is one."""
    first = [] if bos is None else [torch.tensor([bos])]
    return torch.cat([part for window in windows for part in (*first, window)])


def _enough(ids: torch.Tensor, corpus: Corpus, window: int, max_tokens: int) -> torch.Tensor:
    if max_tokens < window:
        raise DataError(
            f"At most {max_tokens:,} evaluation tokens are fewer than one window of {window:,}.",
            "Raise the number of evaluation tokens, or lower the window.",
        )
    if len(ids) < window:
        raise DataError(
            f"The evaluation text {corpus.source} has {len(ids):,} tokens, fewer than one window of {window:,}.",
            "Give a longer text, or lower the window.",
        )
    return ids
