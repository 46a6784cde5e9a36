"""Texts that a model writes for prompts, greedily and drawn, so that a person can look at them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.errors import ConfigError, NonFiniteError
from llm_surgeon.records.samples import Continuation
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
        if self.tokens < 1 or not 0 < self.temperature < 100 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"{self.tokens} tokens at a temperature of {self.temperature:g} and a top-p of {self.top_p:g} cannot "
                "be drawn.",
                "Use a token at least, a temperature between 0 and 100, and a top-p above 0, of 1 at most.",
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
        ConfigError: If a prompt and its new tokens are longer than the positions that the model has learned.
    """
    written = []
    with progress.phase(words, 2 * len(prompts), "texts") as phase:
        for prompt in prompts:
            ids = _ids(tokenizer, prompt, chat)
            mask = torch.ones_like(ids)
            greedy = _generated(model, tokenizer, ids, mask, {"max_new_tokens": drawing.tokens, "do_sample": False})
            phase.advance(1)
            drawn = drawn_tokens(model, tokenizer, ids, mask, drawing, drawing.seed)
            phase.advance(1)
            texts = [str(tokenizer.decode(new[0], skip_special_tokens=True)) for new in (greedy, drawn)]
            written.append(Continuation(prompt=prompt, greedy=texts[0], sampled=texts[1]))
    return tuple(written)


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> torch.Tensor:
    """Token ids of a prompt, ``[1, n]``."""
    if chat:
        message = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        return torch.as_tensor(tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids)
    ids = torch.as_tensor(tokenizer(prompt, return_tensors="pt").input_ids)
    # A tokenizer may end each text with a token behind which nothing comes.
    return ids[:, :-1] if ids.shape[1] > 1 and int(ids[0, -1]) == tokenizer.eos_token_id else ids


def drawn_tokens(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    ids: torch.Tensor,
    mask: torch.Tensor,
    drawing: Drawing,
    seed: int,
) -> torch.Tensor:
    """Tokens that a model draws behind prompts, ``[n, tokens]``; behind its end a row has tokens that mean nothing.

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
) -> torch.Tensor:
    """Tokens that a model writes behind prompts, ``[n, tokens]``.

    Raises:
        NonFiniteError: If the model's predictions are not finite.
    """
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None) or tokenizer.eos_token_id
    pad = ends[0] if isinstance(ends, list) else ends
    how = GenerationConfig(eos_token_id=ends, pad_token_id=pad, **options)
    try:
        whole = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), generation_config=how)
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise NonFiniteError(
            "The model's predictions are not finite.", "Check its weights, or use --dtype float32."
        ) from None
    result: torch.Tensor = whole[:, ids.shape[1] :]
    return result
