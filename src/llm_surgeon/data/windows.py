"""Windows of a text to evaluate on: their sizes, and which tokens of each are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_surgeon.errors import ConfigError, DataError


@dataclass(frozen=True)
class EvaluationText:
    """A text to measure perplexity on, with its windows.

    Attributes:
        tokens: ``[n]`` token ids of the text as one sequence; tokens at the end that do not fill a window are left out.
            With ``bos``, the tokens of all windows one behind the other.
        name: Name of the text, for the record.
        window: Tokens per window; the first token of a window is context only.
        stride: Tokens from one window's start to the next one's.
        precision: ``bfloat16`` (autocast) or ``float32``.
        bos: Whether each window begins with the token that begins a text. The window's other tokens are of the text.
        sources: Names, numbers of windows and shares of the texts that this one is joined of, in their order; empty for
            one text. The windows of such a text do not overlap.

    Raises:
        DataError: If the text is shorter than one window.
        ConfigError: If the windows are refused, see ``check_windows``.
    """

    tokens: Tensor
    name: str
    window: int
    stride: int
    precision: str = "bfloat16"
    bos: bool = False
    sources: tuple[tuple[str, int, float], ...] = ()

    def __post_init__(self) -> None:
        if len(self.tokens) < self.window:
            raise DataError(
                f"The evaluation text has {len(self.tokens)} tokens, fewer than one window of {self.window}.",
                "Give a longer text or a smaller window.",
            )
        check_windows(self.window, self.stride, self.precision)

    @property
    def windows(self) -> list[tuple[int, int]]:
        """Start of each whole window, and the first target in it that no earlier window scored.

        With a stride below the window, windows overlap, and a later window scores its new tokens only.
        """
        between = self.window if self.bos else self.stride
        starts = range(0, len(self.tokens) - self.window + 1, between)
        return [(start, 1 if start == 0 else max(1, self.window - self.stride)) for start in starts]

    @property
    def parts(self) -> tuple[tuple[str, int, float], ...]:
        """Names, numbers of windows and shares of the texts that this one is joined of: ``sources``, or itself."""
        return self.sources or ((self.name, len(self.windows), 1.0),)

    @property
    def work(self) -> int:
        """Number of tokens that ``perplexity`` reports as its progress, all together."""
        return len(self.windows) * self.stride


def joined(texts: Sequence[EvaluationText], shares: Sequence[float]) -> EvaluationText:
    """Several texts with the same windows, which do not overlap, as one text; shares are those of the mean."""
    if len(texts) == 1:
        return texts[0]
    counts = [len(text.windows) for text in texts]
    tokens = torch.cat([text.tokens[: count * text.window] for text, count in zip(texts, counts, strict=True)])
    names = [text.name for text in texts]
    sources = tuple(zip(names, counts, shares, strict=True))
    return replace(texts[0], tokens=tokens, name=" + ".join(names), sources=sources)


def check_windows(window: int, stride: int, precision: str) -> None:
    """Make sure that a text can be cut into such windows and run in such a precision.

    Raises:
        ConfigError: If the precision is unknown, the stride skips tokens, or a window would score no token.
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
