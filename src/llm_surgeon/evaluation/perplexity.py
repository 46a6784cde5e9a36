"""Token perplexity over windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.curvature.kfac import arithmetic, frozen
from llm_surgeon.curvature.loss import CHUNK
from llm_surgeon.errors import DataError, NonFiniteError
from llm_surgeon.records import Perplexity


def windows(tokens: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Start of each whole window, and its first target that no earlier window scored.

    With a stride below the window, windows overlap, and a later window scores the tokens that are new to it only.
    """
    starts = range(0, tokens - window + 1, stride)
    return [(start, 1 if start == 0 else max(1, window - stride)) for start in starts]


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    window: int,
    stride: int | None = None,
    precision: str = "bfloat16",
    data: str = "",
    advance: Callable[[int], None] = lambda _tokens: None,
) -> Perplexity:
    """Exponential of the mean over windows of the windows' mean negative log-likelihood.

    Args:
        model: A causal language model.
        tokens: ``[n]`` token ids of the text as one sequence; what does not fill a window is left out.
        window: Tokens per window; the first token of a window is context only.
        stride: Tokens from one window's start to the next one's; the window if None.
        precision: ``bfloat16`` (autocast) or ``float32``.
        data: Name of the text, for the record.
        advance: Called with the number of tokens after each window.

    Raises:
        DataError: If the text does not fill one window.
        NonFiniteError: If the model's loss is not finite.
    """
    stride = stride or window
    places = windows(len(tokens), window, stride)
    if not places:
        raise DataError(
            f"The evaluation text has {len(tokens)} tokens, fewer than one window of {window}.",
            "Give a longer text or a smaller window.",
        )
    device = next(model.parameters()).device
    means, scored = 0.0, 0
    with frozen(model), arithmetic(device, precision):
        for start, first in places:
            ids = tokens[start : start + window].to(device)
            total = _window_loss(model, ids, first)
            if not math.isfinite(total):
                raise NonFiniteError(
                    f"The loss of the evaluation window at token {start} is not finite.",
                    "Evaluate with --precision float32, or check the model's weights.",
                )
            means += total / (window - first)
            scored += window - first
            advance(window)
    nll = means / len(places)
    return Perplexity(
        perplexity=math.exp(min(nll, 700.0)),
        nll=nll,
        tokens=scored,
        window=window,
        stride=stride,
        data=data,
        precision=precision,
    )


def _window_loss(model: PreTrainedModel, ids: Tensor, first: int) -> float:
    """Summed negative log-likelihood of targets ``first`` to the end of one window ``[window]``."""
    hidden = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0, first - 1 : -1]
    head, total = model.get_output_embeddings(), 0.0
    for start in range(0, len(hidden), CHUNK):
        logits = head(hidden[start : start + CHUNK]).float()
        labels = ids[first + start : first + start + CHUNK]
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    return total
