"""Texts of a run: those to calibrate on and those to evaluate on, never the same tokens."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_surgeon.data.chats import Chat, chat_from
from llm_surgeon.data.corpora import Corpus, checked_text, document_of, load_corpus
from llm_surgeon.data.tokens import (
    CalibrationTokens,
    evaluation_tokens,
    first_token,
    mixed,
    sample_calibration,
    windows_with_bos,
)
from llm_surgeon.data.windows import EvaluationText, check_windows, joined
from llm_surgeon.errors import ConfigError, DataError
from llm_surgeon.recipe.config import Bos, PruneConfig
from llm_surgeon.recipe.quantity import shown
from llm_surgeon.recipe.sources import Source, allotted, sources_of

log = logging.getLogger(__name__)

CALIBRATION, EVALUATION = 0, 1
# Name of a calibration text that was given in memory, in recipes and reports.
IN_MEMORY = "texts in memory"


@dataclass(frozen=True)
class Texts:
    """Tokens of a run; ``evaluation`` is None if the recipe asks for no evaluation."""

    calibration: CalibrationTokens
    evaluation: EvaluationText | None

    @property
    def digest(self) -> str:
        """SHA-256 of all tokens, as hexadecimal digits."""
        digest = hashlib.sha256(self.calibration.input_ids.numpy().tobytes())
        if self.evaluation is not None:
            digest.update(self.evaluation.tokens.numpy().tobytes())
        return digest.hexdigest()


def corpus_of(texts: Sequence[str | Mapping[str, Any] | Sequence[Any]]) -> Corpus:
    """A corpus of documents in memory: texts, rows as of a .jsonl file, or lists of messages.

    Raises:
        DataError: If they are not a sequence of these, or hold no text.
    """
    remedy = "Give a list of strings, or of chats: texts=['one text', 'another']."
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise DataError(f"The texts are a {type(texts).__name__}, not a list of strings.", remedy)
    if not texts:
        raise DataError("The list of texts is empty, so it holds no text.", remedy)
    given = [_given(text, f"texts[{number}]", remedy) for number, text in enumerate(texts)]
    return Corpus(tuple(document for document in given if document is not None), IN_MEMORY)


def _given(text: Any, location: str, remedy: str) -> str | Chat | None:
    """A document in memory.

    Raises:
        DataError: If it is none.
    """
    if isinstance(text, str):
        return checked_text(text, location)
    if isinstance(text, Mapping):
        return document_of(text, location, None, "key")
    if isinstance(text, Sequence):
        return chat_from(text, location)
    raise DataError(f"{location} is a {type(text).__name__}, in what is to be a list of strings.", remedy)


def prepare_texts(tokenizer: PreTrainedTokenizerBase, config: PruneConfig, given: Corpus | None = None) -> Texts:
    """Read and tokenise the texts.

    Unless the recipe names other texts to evaluate on, the last tenth of each calibration text is held out for it.

    Args:
        tokenizer: Tokenizer of the model.
        config: The recipe.
        given: The text that the recipe names ``IN_MEMORY``.

    Raises:
        DataError: If a text cannot be read or is too short.
        ConfigError: If the windows are refused, see ``check_windows``; or there are too few sequences for the shares.
    """
    calibrated = sources_of(config.calibration)
    if not config.evaluates:
        return Texts(_calibration(tokenizer, config, calibrated, frozenset(), given), None)
    evaluated = sources_of(config.evaluation or config.calibration)
    both = held_out(calibrated, evaluated)
    calibration = _calibration(tokenizer, config, calibrated, both, given)
    evaluation = text_to_evaluate(
        tokenizer,
        evaluated,
        both,
        window=config.eval_window,
        max_tokens=config.eval_tokens,
        precision=config.precision,
        bos=config.bos,
        given={} if given is None else {IN_MEMORY: given},
    )
    return Texts(calibration, evaluation)


def held_out(used: Sequence[Source], evaluated: Sequence[Source]) -> frozenset[str]:
    """Names of the texts that are both used and evaluated on, whose last part is held out, in all their spellings.

    Args:
        used: Texts to calibrate or to train on.
        evaluated: Texts to evaluate on.
    """
    both = {_file_of(source.text) for source in used} & {_file_of(source.text) for source in evaluated}
    return frozenset(source.text for source in (*used, *evaluated) if _file_of(source.text) in both)


def _file_of(text: str) -> str:
    """The file that a text names, however its path is written; the name itself if it is no file."""
    path = os.path.expanduser(text)
    return os.path.realpath(path) if os.path.exists(path) else text


def text_to_evaluate(
    tokenizer: PreTrainedTokenizerBase,
    sources: tuple[Source, ...],
    split: frozenset[str],
    *,
    window: int,
    max_tokens: int,
    precision: str,
    bos: Bos,
    given: Mapping[str, Corpus] = MappingProxyType({}),
) -> EvaluationText:
    """Read and tokenise texts to evaluate on, as one text with windows of each.

    Args:
        tokenizer: Tokenizer of the model.
        sources: The texts, with their shares of the windows.
        split: Names of the texts of which only the held-out part is taken.
        window: Tokens per window.
        max_tokens: Tokens to take of all texts together, at most.
        precision: ``bfloat16`` or ``float32``.
        bos: Whether windows begin with the token that begins a text, see ``first_token``.
        given: Texts that have been read already, whole, by their names.

    Raises:
        DataError: If a text cannot be read or is too short.
        ConfigError: If the windows are refused, see ``check_windows``; or a text would have no window.
    """
    parts = [
        evaluation_text(
            tokenizer,
            source.text,
            window=window,
            stride=None,
            max_tokens=tokens,
            precision=precision,
            bos=bos,
            split=source.text in split,
            given=given.get(source.text),
        )
        for source, tokens in zip(sources, _tokens_of(sources, max_tokens, window), strict=True)
    ]
    return joined(parts, [source.share for source in sources])


def _tokens_of(sources: tuple[Source, ...], max_tokens: int, window: int) -> list[int]:
    """Largest number of tokens of each text to evaluate on.

    Raises:
        ConfigError: If one of several texts would have no window.
    """
    if len(sources) == 1:
        return [max_tokens]
    windows = allotted(sources, max_tokens // window)
    if 0 in windows:
        raise ConfigError(
            f"{max_tokens:,} evaluation tokens (--eval-tokens) in windows of {window:,} leave none for "
            f"{shown(sources[windows.index(0)].text)}.",
            "Raise --eval-tokens, or lower --eval-window.",
        )
    return [count * window for count in windows]


def _calibration(
    tokenizer: PreTrainedTokenizerBase,
    config: PruneConfig,
    sources: tuple[Source, ...],
    split: frozenset[str],
    given: Corpus | None,
) -> CalibrationTokens:
    """Draw the calibration sequences, of each text as many as it has a share of.

    Args:
        tokenizer: Tokenizer of the model.
        config: The recipe.
        sources: The texts.
        split: Those of them whose last tenth is held out.
        given: The text in memory, see ``prepare_texts``.

    Raises:
        DataError: If a text cannot be read or is too short.
        ConfigError: If there are fewer sequences than a text's share has to have.
    """
    counts, chats, drawn = allotted(sources, config.samples), 0, []
    if 0 in counts:
        raise ConfigError(
            f"{config.samples:,} calibration sequences (--samples) leave none for "
            f"{shown(sources[counts.index(0)].text)}, whose share is {sources[counts.index(0)].share:.3g}.",
            "Raise --samples, or the share.",
        )
    first = first_token(tokenizer, config.bos)
    for source, count in zip(sources, counts, strict=True):
        of_memory = given if source.text == IN_MEMORY else None
        corpus = part_of(source.text, CALIBRATION, split=source.text in split, given=of_memory)
        chats += corpus.chats
        drawn.append(
            sample_calibration(tokenizer, corpus, count, config.seq_len, config.seed, config.windows_per_sample, first)
        )
    if getattr(tokenizer, "chat_template", None) and not chats:
        log.info(
            "The tokenizer has a template for chats, and the calibration text has none. What the model says in chats "
            "may suffer more than perplexity tells; --calibration takes chats too."
        )
    return mixed(drawn, [source.share for source in sources])


def evaluation_text(
    tokenizer: PreTrainedTokenizerBase,
    spec: str,
    *,
    window: int,
    stride: int | None,
    max_tokens: int,
    precision: str,
    bos: Bos = "auto",
    split: bool = False,
    given: Corpus | None = None,
) -> EvaluationText:
    """Read and tokenise a text to evaluate on.

    Args:
        tokenizer: Tokenizer of the model.
        spec: The text, see ``load_corpus``.
        window: Tokens per window.
        stride: Tokens from one window's start to the next one's; None is the window.
        max_tokens: Tokens to take, at most.
        precision: ``bfloat16`` or ``float32``.
        bos: Whether windows begin with the token that begins a text, see ``first_token``.
        split: Whether to take the held-out part of the text only. Of demo texts it is always taken.
        given: The text, if it is in memory already; None reads the one that ``spec`` names.

    Raises:
        DataError: If the text cannot be read or is too short.
        ConfigError: If the windows are refused, see ``check_windows``.
    """
    corpus = part_of(spec, EVALUATION, split=split, given=given)
    name = f"{spec} (held-out part)" if split or _is_demo(spec) else spec
    first, stride = first_token(tokenizer, bos), stride or window
    check_windows(window, stride, precision)
    if first is None:
        tokens = evaluation_tokens(tokenizer, corpus, window, max_tokens)
    else:
        tokens = windows_with_bos(tokenizer, corpus, window, stride, max_tokens, first)
    return EvaluationText(tokens, name, window, stride, precision, bos=first is not None)


def part_of(spec: str, part: int, *, split: bool, given: Corpus | None = None) -> Corpus:
    """The part of a text to calibrate or train on (0), or the part that is held out (1); of a whole text, all of it.

    Args:
        spec: The text, see ``load_corpus``.
        part: ``CALIBRATION`` or ``EVALUATION``.
        split: Whether the text is to be split. Demo texts always are.
        given: The text, if it is in memory already.

    Raises:
        DataError: If the text cannot be read, or is too short to be split.
    """
    corpus = given or load_corpus(spec)
    return corpus.split()[part] if split or _is_demo(spec) else corpus


def _is_demo(spec: str) -> bool:
    return spec.split(":")[0] == "demo"
