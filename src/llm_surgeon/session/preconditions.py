"""Preconditions of a run, checked before anything expensive: positions, embeddings, tokenizer, stored type."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.data.texts import Texts
from llm_surgeon.errors import ConfigError, DataError
from llm_surgeon.models.overflow import loss_not_finite
from llm_surgeon.models.probe import probe_logits, probe_tokens
from llm_surgeon.recipe.config import PruneConfig

logger = logging.getLogger(__name__)

# Share of unknown tokens beyond which a text is probably not one for this tokenizer.
_MOST_UNKNOWN = 0.1


def check_recipe_fits(config: PruneConfig, settings: Any) -> None:
    """Make sure that a model has positions for the sequences and windows of a recipe.

    Args:
        config: The recipe.
        settings: Configuration of the model.

    Raises:
        ConfigError: See ``check_positions``.
    """
    lengths = {"seq_len": config.seq_len}
    if config.evaluates:
        lengths["eval_window"] = config.eval_window
    check_positions(settings, lengths)


def positions_of(settings: Any) -> tuple[float, bool]:
    """Number of positions that a model was trained with, and whether it has learned each of them.

    Rotary positions have no end; where a configuration says nothing, the number is infinite.

    Args:
        settings: Configuration of the model.
    """
    settings = settings.get_text_config()
    positions = getattr(settings, "max_position_embeddings", None)
    rotary = any(getattr(settings, name, None) is not None for name in ("rope_parameters", "rope_theta"))
    return (positions, not rotary) if isinstance(positions, int) else (math.inf, False)


def check_positions(settings: Any, lengths: Mapping[str, int]) -> None:
    """Make sure that a model has positions for sequences of some lengths.

    Rotary positions have no end, but the model has not seen the later ones in training: this is logged.

    Args:
        settings: Configuration of the model.
        lengths: Tokens of the sequences, by the option that sets them.

    Raises:
        ConfigError: If the model has learned its positions, and has fewer than a length.
    """
    positions, learned = positions_of(settings)
    for name, length in lengths.items():
        if length <= positions:
            continue
        if learned:
            raise ConfigError(
                f"{name} is {length:,}, and the model has learned {positions:,} positions (max_position_embeddings).",
                f"Use --{name.replace('_', '-')} {positions} or less.",
            )
        logger.warning(
            "%s is %s, and the model was trained with %s positions (max_position_embeddings): what it makes of later "
            "ones may say little of it",
            name,
            f"{length:,}",
            f"{positions:,}",
        )


def check_texts(settings: Any, texts: Texts) -> None:
    """Make sure that a model has an embedding for every token of its texts.

    Raises:
        DataError: See ``check_tokens``.
    """
    parts = [texts.calibration.input_ids]
    if texts.evaluation is not None:
        parts.append(texts.evaluation.tokens)
    check_tokens(settings, parts)


def warn_of_unknown(tokenizer: PreTrainedTokenizerBase, texts: Texts) -> None:
    """Log a warning if much of the calibration text is unknown to the tokenizer."""
    unknown = tokenizer.unk_token_id
    # Tokenizers that know every byte, as those of Llama 3 and Qwen, have no token for what they do not know.
    if unknown is None:
        return
    share = float((texts.calibration.input_ids == unknown).float().mean())
    if share > _MOST_UNKNOWN:
        logger.warning(
            "%.0f %% of the calibration tokens are %r, the token for what the tokenizer does not know: is the text "
            "what the model was made for?",
            *(100 * share, tokenizer.unk_token),
        )


def check_tokens(settings: Any, parts: Iterable[Tensor]) -> None:
    """Make sure that a model has an embedding for every token.

    Args:
        settings: Configuration of the model.
        parts: Token ids, of any shapes.

    Raises:
        DataError: If a token has no embedding: the tokenizer is not that of the model.
    """
    largest, rows = max(int(part.max()) for part in parts), settings.get_text_config().vocab_size
    if largest >= rows:
        raise DataError(
            f"The tokenizer makes tokens up to {largest:,} of the text, and the model has embeddings for {rows:,}.",
            "Give the tokenizer that the model was trained with, or resize its embeddings (resize_token_embeddings).",
        )


def warn_of_tokenizer(settings: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Log a warning if a tokenizer knows tokens for which a model has no embedding."""
    rows = settings.get_text_config().vocab_size
    if len(tokenizer) > rows:
        logger.warning(
            "the tokenizer knows %s tokens, and the model has embeddings for %s: text with the others ends in an error",
            f"{len(tokenizer):,}",
            f"{rows:,}",
        )


def check_stored_type(model: PreTrainedModel) -> None:
    """Make sure that a float16 model can be run in its own type, in which its export is checked and used.

    Passes compute in bfloat16, which has the range of float32.

    Raises:
        NonFiniteError: If a module overflows; names it.
    """
    if model.dtype != torch.float16:
        return
    if not bool(probe_logits(model).isfinite().all()):
        ids = probe_tokens(model).to(next(model.parameters()).device)
        raise loss_not_finite(model, ids, "a pass in float16, the type of the weights,")
