"""Token perplexity over windows of a text."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.models.modes import arithmetic, frozen
from llm_surgeon.models.overflow import loss_not_finite
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.passes.head import head_loss, last_states
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.records import Perplexity, SourcePerplexity
from llm_surgeon.system.processes import ALONE, Processes

# Tokens that go through each block together where weights are streamed.
_TOGETHER = 2**15


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    text: EvaluationText,
    advance: Callable[[int], None] = lambda _tokens: None,
    observe: Callable[[Tensor], None] = lambda _states: None,
    processes: Processes = ALONE,
) -> Perplexity:
    """Perplexity: the exponential of the mean over windows of the windows' mean negative log-likelihood.

    Args:
        model: A causal language model.
        text: The text to measure on.
        advance: Called with the number of tokens after each window.
        observe: Called in each window with the last hidden states ``[n, width]`` of the positions it scores, under the
            arithmetic in which their logits are computed. Other measurements can so be made in the same pass.
        processes: Processes that share the windows; each gets the perplexity of all windows.

    Raises:
        NonFiniteError: If the model's loss is not finite.
    """
    device = next(model.parameters()).device
    ends = list(accumulate(count for _, count, _ in text.parts))
    means, scored = [0.0] * len(ends), 0
    windows = processes.own(text.windows)
    with frozen(model), arithmetic(device, text.precision):
        for (start, first), ids, hidden in _passes(model, text, windows):
            scoring = hidden[first - 1 : -1]
            loss = head_loss(model, scoring, ids[first:])
            if not math.isfinite(loss):
                raise loss_not_finite(model, ids[None], f"the evaluation window at token {start}")
            observe(scoring)
            means[bisect_right(ends, start // text.window)] += loss / (text.window - first)
            scored += text.window - first
            advance(text.stride)
    *totals, counted = processes.total(*means, scored)
    own = [total / count for (_, count, _), total in zip(text.parts, totals, strict=True)]
    # By the shares, as a text may be too short for as many windows as its share asks for.
    nll = sum(share * part for (_, _, share), part in zip(text.parts, own, strict=True))
    return Perplexity(
        perplexity=_exponential(nll),
        nll=nll,
        tokens=round(counted),
        window=text.window,
        stride=text.stride,
        data=text.name,
        precision=text.precision,
        bos=text.bos,
        sources=tuple(
            SourcePerplexity(data=name, perplexity=_exponential(part), nll=part, windows=count)
            for (name, count, _), part in zip(text.sources, own, strict=False)
        ),
    )


def _exponential(nll: float) -> float:
    # A loss above 700 is of a broken model; it is capped so that the table can be printed.
    return math.exp(min(nll, 700.0))


def _passes(
    model: PreTrainedModel, text: EvaluationText, windows: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """Yield each window with its tokens ``[n]`` and last hidden states ``[n, width]``, on the model's device."""
    device, blocks = next(model.parameters()).device, weights_of(model).blocks
    if blocks is None:
        for window in windows:
            ids = text.tokens[window[0] : window[0] + text.window].to(device)
            yield window, ids, last_states(model, ids[None], None)
        return
    # Streamed weights are brought once for many windows.
    together = max(1, _TOGETHER // text.window)
    for start in range(0, len(windows), together):
        part = windows[start : start + together]
        ids = torch.stack([text.tokens[first : first + text.window] for first, _ in part])
        sweep = Sweep(model, blocks, CalibrationTokens(ids, None, {}), 1, text.precision, fast_attention=False)
        for block in range(len(sweep)):
            sweep.pass_through(block)
        for window, batch in zip(part, sweep.batches, strict=True):
            yield window, batch.input_ids[0], sweep.last_states(batch, batch.hidden.get())
