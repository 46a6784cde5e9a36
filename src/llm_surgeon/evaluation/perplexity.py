"""Token perplexity over windows of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.curvature.sweep import Sweep
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError, DataError
from llm_surgeon.models.head import head_loss, last_states
from llm_surgeon.models.modes import arithmetic, frozen
from llm_surgeon.models.overflow import loss_not_finite
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.processes import ALONE, Processes
from llm_surgeon.records import Perplexity

# Tokens that go through the blocks together where weights are streamed.
_TOGETHER = 2**15


@dataclass(frozen=True)
class EvaluationText:
    """A text to measure perplexity on, and how.

    Attributes:
        tokens: ``[n]`` token ids of the text as one sequence; what does not fill a window is left out. With ``bos``,
            those of all windows one behind the other.
        name: Name of the text, for the record.
        window: Tokens per window; the first token of a window is context only.
        stride: Tokens from one window's start to the next one's.
        precision: ``bfloat16`` (autocast) or ``float32``.
        bos: Whether each window begins with the token that begins a text; the window's other tokens are of the text.
    """

    tokens: Tensor
    name: str
    window: int
    stride: int
    precision: str = "bfloat16"
    bos: bool = False

    def __post_init__(self) -> None:
        if len(self.tokens) < self.window:
            raise DataError(
                f"The evaluation text has {len(self.tokens)} tokens, fewer than one window of {self.window}.",
                "Give a longer text or a smaller window.",
            )
        check_windows(self.window, self.stride, self.precision)

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Start of each whole window, and its first target that no earlier window scored.

        With a stride below the window, windows overlap, and a later window scores the tokens new to it only.
        """
        between = self.window if self.bos else self.stride
        starts = range(0, len(self.tokens) - self.window + 1, between)
        return [(start, 1 if start == 0 else max(1, self.window - self.stride)) for start in starts]

    @property
    def work(self) -> int:
        """Tokens that ``perplexity`` reports as its progress, all together."""
        return len(self.windows) * self.stride


def check_windows(window: int, stride: int, precision: str) -> None:
    """Make sure that a text can be cut into such windows and run so.

    Raises:
        ConfigError: If it cannot.
    """
    if precision not in ("bfloat16", "float32"):
        raise ConfigError(f"The precision {precision!r} is not known.", "Use bfloat16 or float32.")
    if window < 2 or stride < 1:
        raise ConfigError(
            f"Windows of {window} tokens, {stride} apart, score nothing.",
            "Give a window of at least 2 tokens and a stride of at least 1.",
        )
    if stride > window:
        raise ConfigError(
            f"A stride of {stride} skips tokens between windows of {window}.", "Give a stride of at most the window."
        )


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    text: EvaluationText,
    advance: Callable[[int], None] = lambda _tokens: None,
    observe: Callable[[Tensor], None] = lambda _states: None,
    processes: Processes = ALONE,
) -> Perplexity:
    """Exponential of the mean over windows of the windows' mean negative log-likelihood.

    Args:
        model: A causal language model.
        text: What to measure on.
        advance: Called with the number of tokens after each window.
        observe: Called in each window with the last hidden states ``[n, width]`` of the positions it scores, under the
            arithmetic in which their logits are computed: for what else is to be measured in the same pass.
        processes: Who share the windows; each gets the perplexity of all of them.

    Raises:
        NonFiniteError: If the model's loss is not finite.
    """
    device = next(model.parameters()).device
    means, scored = 0.0, 0
    windows = processes.own(text.windows)
    with frozen(model), arithmetic(device, text.precision):
        for (start, first), ids, hidden in _passes(model, text, windows):
            scoring = hidden[first - 1 : -1]
            loss = head_loss(model, scoring, ids[first:])
            if not math.isfinite(loss):
                raise loss_not_finite(model, ids[None], f"the evaluation window at token {start}")
            observe(scoring)
            means += loss / (text.window - first)
            scored += text.window - first
            advance(text.stride)
    total, counted = processes.total(means, scored)
    nll = total / len(text.windows)
    return Perplexity(
        # A loss that large is a broken model; what matters is that the table can be printed.
        perplexity=math.exp(min(nll, 700.0)),
        nll=nll,
        tokens=round(counted),
        window=text.window,
        stride=text.stride,
        data=text.name,
        precision=text.precision,
        bos=text.bos,
    )


def _passes(
    model: PreTrainedModel, text: EvaluationText, windows: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """Each window with its tokens ``[n]`` and last hidden states ``[n, width]``, on the model's device."""
    device, blocks = next(model.parameters()).device, weights_of(model).blocks
    if blocks is None:
        for window in windows:
            ids = text.tokens[window[0] : window[0] + text.window].to(device)
            yield window, ids, last_states(model, ids[None], None)
        return
    # Weights that come and go are to come once for many windows.
    together = max(1, _TOGETHER // text.window)
    for start in range(0, len(windows), together):
        part = windows[start : start + together]
        ids = torch.stack([text.tokens[first : first + text.window] for first, _ in part])
        sweep = Sweep(model, blocks, CalibrationTokens(ids, None, {}), 1, text.precision, fast_attention=False)
        for block in range(len(sweep)):
            sweep.pass_through(block)
        for window, batch in zip(part, sweep.batches, strict=True):
            yield window, batch.input_ids[0], sweep.last_states(batch, batch.hidden.get())
