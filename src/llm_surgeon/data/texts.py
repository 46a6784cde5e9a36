"""The two texts of a run: one to calibrate on, one to evaluate on, never the same tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from llm_surgeon.data.chats import Chat, chat_from
from llm_surgeon.data.corpora import Corpus, document_of, load_corpus
from llm_surgeon.data.tokens import (
    CalibrationTokens,
    evaluation_tokens,
    first_token,
    sample_calibration,
    windows_with_bos,
)
from llm_surgeon.data.windows import EvaluationText, check_windows
from llm_surgeon.errors import DataError
from llm_surgeon.recipe.config import Bos, PruneConfig

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
        return text
    if isinstance(text, Mapping):
        return document_of(text, location, None, "key")
    if isinstance(text, Sequence):
        return chat_from(text, location)
    raise DataError(f"{location} is a {type(text).__name__}, in what is to be a list of strings.", remedy)


def prepare_texts(tokenizer: PreTrainedTokenizerBase, config: PruneConfig, given: Corpus | None = None) -> Texts:
    """Read and tokenise both texts.

    Unless the recipe names another text to evaluate on, the last tenth of the calibration text is held out for it.

    Args:
        tokenizer: Tokenizer of the model.
        config: The recipe.
        given: The calibration text, if it is in memory already; None reads the one that the recipe names.

    Raises:
        DataError: If a text cannot be read or is too short.
        ConfigError: If the windows are refused, see ``check_windows``.
    """
    spec = config.evaluation or config.calibration
    same = spec == config.calibration
    corpus = _part(config.calibration, CALIBRATION, split=same, given=given)
    if getattr(tokenizer, "chat_template", None) and not corpus.chats:
        log.info(
            "The tokenizer has a template for chats, and the calibration text has none. What the model says in chats "
            "may suffer more than perplexity tells; --calibration takes chats too."
        )
    calibration = sample_calibration(
        tokenizer,
        corpus,
        config.samples,
        config.seq_len,
        config.seed,
        config.windows_per_sample,
        first_token(tokenizer, config.bos),
    )
    if spec == "none":
        return Texts(calibration, None)
    evaluation = evaluation_text(
        tokenizer,
        spec,
        window=config.eval_window,
        stride=None,
        max_tokens=config.eval_tokens,
        precision=config.precision,
        bos=config.bos,
        split=same,
        given=given if same else None,
    )
    return Texts(calibration, evaluation)


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
    corpus = _part(spec, EVALUATION, split=split, given=given)
    name = f"{spec} (held-out part)" if split or _is_demo(spec) else spec
    first, stride = first_token(tokenizer, bos), stride or window
    check_windows(window, stride, precision)
    if first is None:
        tokens = evaluation_tokens(tokenizer, corpus, window, max_tokens)
    else:
        tokens = windows_with_bos(tokenizer, corpus, window, stride, max_tokens, first)
    return EvaluationText(tokens, name, window, stride, precision, bos=first is not None)


def _part(spec: str, part: int, *, split: bool, given: Corpus | None = None) -> Corpus:
    corpus = given or load_corpus(spec)
    return corpus.split()[part] if split or _is_demo(spec) else corpus


def _is_demo(spec: str) -> bool:
    return spec.split(":")[0] == "demo"
