"""A chat text that a model writes itself, to calibrate on what it says in chats without a data set of chats."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llm_surgeon.data.chat_prompts import MOST, chat_prompts
from llm_surgeon.errors import ConfigError
from llm_surgeon.evaluation.sampling import Drawing, check_room, drawn_tokens, prompt_ids, prompt_text
from llm_surgeon.models.loading import (
    check_dtype,
    load,
    load_config,
    load_tokenizer,
    resolve_device,
    resolve_source,
)
from llm_surgeon.session.given import as_path, ready
from llm_surgeon.system.files import check_result_file, in_place
from llm_surgeon.system.progress import Progress, SilentProgress

logger = logging.getLogger(__name__)

# Chats that are written side by side. It is fixed, as what is drawn depends on it.
_TOGETHER = 16
# Tokens of a second prompt, at most, with what a template adds.
_FURTHER = 64


def write_chats(
    model: str | Path,
    out: str | Path,
    *,
    rows: int = 400,
    tokens: int = 160,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> int:
    """Let a chat model answer prompts of this package, and write the chats as rows of ``messages``.

    Every third chat has two turns. The same seed gives the same chats on the same machine.

    Args:
        model: A local directory, a hub id, or ``demo``; the dense model, before it is pruned.
        out: File to write, ``.jsonl``; must not exist.
        rows: Number of chats.
        tokens: Tokens of each answer, at most.
        temperature: Temperature of the answers.
        top_p: Share of the probability from whose likeliest tokens the answers come.
        seed: Seed of the prompts and of the answers.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: Whether code of the checkpoint may run, if it is not an export of this package.
        progress: Display of the progress; None shows nothing.

    Returns:
        Number of tokens that were written.

    Raises:
        ConfigError: If the tokenizer has no template for chats or refuses the prompts, or the numbers cannot be.
        OutputError: If the file is there already, or cannot be written.
        ModelError: If the model cannot be loaded.
        NonFiniteError: If predictions are not finite.
    """
    file, drawing = as_path(out), Drawing(tokens, temperature, top_p, seed)
    if file.suffix != ".jsonl":
        raise ConfigError(f"{file} is to hold rows of JSON.", "Give it a name that ends in .jsonl.")
    if not 1 <= rows <= MOST:
        raise ConfigError(f"{rows:,} chats were asked for.", f"Ask for 1 to {MOST}.")
    check_dtype(dtype)
    resolve_device(device)
    check_result_file(file)
    source = resolve_source(str(model))
    words = load_tokenizer(source, trust_remote_code)
    if not words.chat_template:
        raise ConfigError(
            f"The tokenizer of {model} has no template for chats, so that it is no chat model.",
            "Calibrate such a model on prose.",
        )
    prompts, display = chat_prompts(rows, seed), progress or SilentProgress()
    longest = max(prompt_ids(words, said[0], chat=True).shape[1] for said in prompts)
    check_room(load_config(source, trust_remote_code), longest + _FURTHER, 2 * tokens)
    logger.info("loading %s", model)
    network, tokenizer = load(model, dtype, device, trust_remote_code)
    chats: list[list[dict[str, str]]] = []
    written = 0
    with ready(network), display.phase("chats", rows, "chats") as phase:
        for start in range(0, rows, _TOGETHER):
            made, count = _chats(network, tokenizer, prompts[start : start + _TOGETHER], drawing, seed + start)
            chats += made
            written += count
            phase.advance(len(made))
    with in_place(file) as path:
        lines = (json.dumps({"messages": messages}, ensure_ascii=False) for messages in chats)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf8")
    return written


def _chats(
    network: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[tuple[str, ...]], drawing: Drawing, seed: int
) -> tuple[list[list[dict[str, str]]], int]:
    """Chats of some prompts, turn by turn, and the number of tokens of their answers."""
    chats: list[list[dict[str, str]]] = [[] for _ in prompts]
    written = 0
    for turn in range(max(map(len, prompts))):
        now = [chat for chat, said in zip(chats, prompts, strict=True) if len(said) > turn]
        for chat, said in zip(now, (said for said in prompts if len(said) > turn), strict=True):
            chat.append({"role": "user", "content": said[turn]})
        texts = [prompt_text(tokenizer, chat) for chat in now]
        ids, mask = padded(tokenizer, texts)
        answers = drawn_tokens(network, tokenizer, ids, mask, drawing, seed + turn)
        for chat, answer in zip(now, answers, strict=True):
            text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
            written += len(answer)
            chat.append({"role": "assistant", "content": text})
    return chats, written


def padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of texts ``[n, longest]``, padded in front, and where they are real."""
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
    return padded, mask
