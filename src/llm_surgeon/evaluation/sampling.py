"""Texts that a model writes for prompts, greedily and drawn, so that a person can look at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llm_surgeon.data.chats import Chat, text_of
from llm_surgeon.errors import ConfigError, NonFiniteError
from llm_surgeon.recipe.groups.base import MOST_SEED
from llm_surgeon.recipe.quantity import shown
from llm_surgeon.records.samples import Continuation
from llm_surgeon.session.preconditions import positions_of
from llm_surgeon.system.progress import Progress

# Prompts for models that continue a text: facts, sense, arithmetic, code, other languages, a list.
PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "She put the ice cream in the oven, and after ten minutes it had",
    "Two, four, six, eight,",
    "def is_even(number):\n    ",
    "Im Winter fahren viele Menschen in die Berge, um",
    "The three things to pack for a week at the sea are",
    "Once upon a time, a fox and a crow",
)
# Prompts for models that answer.
QUESTIONS = (
    "What is the capital of France?",
    "At what temperature does water boil? Answer in one sentence.",
    "What happens to ice cream in a hot oven?",
    "A train leaves at 9:40 and arrives at 11:05. How long does it take?",
    "Write a Python function that tells whether a number is even.",
    "Warum fahren viele Menschen im Winter in die Berge?",
    "Name three things to pack for a week at the sea.",
    "Tell a story of two sentences about a fox and a crow.",
)


@dataclass(frozen=True)
class Drawing:
    """How texts are written.

    Attributes:
        tokens: Largest number of new tokens.
        temperature: Temperature of the drawn texts.
        top_p: Share of the probability from whose likeliest tokens the drawn texts come.
        seed: Seed of each drawn text.
    """

    tokens: int = 48
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse numbers with which nothing can be drawn.

        Raises:
            ConfigError: If there are such.
        """
        if not 0 <= self.seed <= MOST_SEED:
            raise ConfigError(f"The seed is {self.seed}.", f"Use a whole number from 0 to {MOST_SEED}.")
        if self.tokens < 1 or not 0 < self.temperature < 100 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"{self.tokens} tokens at a temperature of {self.temperature:g} and a top-p of {self.top_p:g} cannot "
                "be drawn.",
                "Use a token at least, a temperature between 0 and 100, and a top-p above 0, of 1 at most.",
            )


def prompt_text(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> str:
    """Text of messages by the tokenizer's template, up to where the model is to answer.

    Raises:
        ConfigError: If the template refuses them.
    """
    try:
        return text_of(Chat(tuple(messages)), tokenizer, asks=True)
    except ValueError as error:
        cause = f"The tokenizer's template refuses a chat that begins with {shown(messages[0]['content'])}: {error}."
        raise ConfigError(cause, "Leave the template out (sample has --no-chat), or mend it.") from None


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids of a prompt, ``[1, n]``.

    Args:
        tokenizer: The tokenizer.
        prompt: The prompt.
        chat: Whether it is a user's message in the tokenizer's template, or the beginning of a text.

    Raises:
        ConfigError: If the template refuses it, or it is no text.
    """
    try:
        prompt.encode("utf8")
    except UnicodeEncodeError:
        raise ConfigError("A prompt holds a broken character (half a surrogate pair).", "Write it in UTF-8.") from None
    if chat:
        text = prompt_text(tokenizer, [{"role": "user", "content": prompt}])
        return torch.as_tensor(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)
    ids = torch.as_tensor(tokenizer(prompt, return_tensors="pt").input_ids)
    # A tokenizer may end each text with a token behind which nothing comes.
    return ids[:, :-1] if ids.shape[1] > 1 and int(ids[0, -1]) == tokenizer.eos_token_id else ids


def check_room(settings: Any, longest: int, tokens: int) -> None:
    """Make sure that a model has positions for prompts and what it is to write behind them.

    Args:
        settings: Configuration of the model.
        longest: Tokens of the longest prompt.
        tokens: Tokens that are to be written, at most.

    Raises:
        ConfigError: If the model has learned its positions, and has fewer.
    """
    positions, learned = positions_of(settings)
    if learned and longest + tokens > positions:
        raise ConfigError(
            f"A prompt of {longest:,} tokens and {tokens:,} behind it do not fit into the {positions:,} positions that "
            "the model has learned.",
            f"Use --tokens {positions - longest} or less." if positions > longest else "Use shorter prompts.",
        )


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    drawing: Drawing,
    progress: Progress,
    *,
    chat: bool,
    words: str,
) -> tuple[Continuation, ...]:
    """Let a model write for prompts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: The prompts.
        drawing: Number of tokens, and how they are drawn.
        progress: Display of the progress.
        chat: Whether the prompts are messages of a user, in the tokenizer's template.
        words: Name of the phase for the display.

    Raises:
        NonFiniteError: If the model's predictions are not finite.
        ConfigError: If the template refuses a prompt.
    """
    written = []
    with progress.phase(words, 2 * len(prompts), "texts") as phase:
        for prompt in prompts:
            ids = prompt_ids(tokenizer, prompt, chat)
            mask = torch.ones_like(ids)
            (greedy,) = _generated(model, tokenizer, ids, mask, {"max_new_tokens": drawing.tokens, "do_sample": False})
            phase.advance(1)
            (drawn,) = drawn_tokens(model, tokenizer, ids, mask, drawing, drawing.seed)
            phase.advance(1)
            texts = [str(tokenizer.decode(new, skip_special_tokens=True)) for new in (greedy, drawn)]
            written.append(Continuation(prompt=prompt, greedy=texts[0], sampled=texts[1]))
    return tuple(written)


def drawn_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    drawing: Drawing,
    seed: int,
) -> list[torch.Tensor]:
    """Tokens that a model draws behind each of some prompts, without the token that ends them.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        ids: Token ids of the prompts, ``[n, length]``, padded in front.
        mask: Where they are real, ``[n, length]``.
        drawing: Number of tokens, and how they are drawn.
        seed: Seed of the draws.

    Raises:
        NonFiniteError: If the model's predictions are not finite.
    """
    drawn = {"temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": 0}
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _generated(model, tokenizer, ids, mask, {"max_new_tokens": drawing.tokens, "do_sample": True} | drawn)


@torch.no_grad()
def _generated(
    model: Any, tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, mask: torch.Tensor, options: dict[str, Any]
) -> list[torch.Tensor]:
    """Tokens that a model writes behind each of some prompts, without the token that ends them.

    Raises:
        NonFiniteError: If the model's predictions are not finite.
    """
    own = getattr(model, "generation_config", None)
    known = getattr(own, "eos_token_id", None)
    known = tokenizer.eos_token_id if known is None else known
    ends = known if isinstance(known, list) else [] if known is None else [known]
    how = GenerationConfig(eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **options)
    # What is not set is taken from the model's own settings, which may punish repetition or search by beams.
    model.generation_config = GenerationConfig()
    try:
        whole = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=how,
            logits_processor=LogitsProcessorList([_Finite()]),
        )
    finally:
        model.generation_config = own
    return [_up_to(row, ends) for row in whole[:, ids.shape[1] :]]


def _up_to(row: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """The tokens ``[n]`` before the first that ends a text."""
    found = torch.isin(row, torch.tensor(ends, device=row.device)).nonzero() if ends else row[:0]
    return row[: int(found[0])] if len(found) else row


class _Finite(LogitsProcessor):
    """Refusal of predictions that are no numbers, of which the likeliest would be a token like any other."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores as they are.

        Raises:
            NonFiniteError: If one is no number.
        """
        if bool(scores.isnan().any()):
            raise NonFiniteError(
                "The model's predictions are not finite.", "Check its weights, or use --dtype float32."
            )
        return scores
