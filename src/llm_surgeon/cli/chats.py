"""The command ``chats``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from llm_surgeon.cli.shared import Device, Dtype, TrustRemoteCode, console, errors_as_messages
from llm_surgeon.system.logs import STARTING, log_to_stderr, quiet_transformers
from llm_surgeon.system.torchrun import require_one_process

logger = logging.getLogger(__name__)


def chats(
    model: Annotated[str, typer.Argument(help="The dense model: a Hugging Face directory, a hub id, or demo.")],
    out: Annotated[Path, typer.Option(help="File to write, .jsonl; must not exist.")],
    rows: Annotated[int, typer.Option(min=1, help="Chats to write.")] = 400,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer, at most.")] = 160,
    temperature: Annotated[float, typer.Option(help="Temperature of the answers.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Share of the probability that the answers come from.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts and answers.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Let MODEL answer prompts that come with this package, as a chat text to calibrate on."""
    with errors_as_messages():
        require_one_process("chats")
        progress_console = log_to_stderr()
        logger.info(STARTING)
        from llm_surgeon.run.chats import write_chats
        from llm_surgeon.system.progress import RichProgress

        quiet_transformers()
        written = write_chats(
            model,
            out,
            rows=rows,
            tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=RichProgress(progress_console),
        )
        console().print(f"{out}: {rows:,} chats, {written:,} tokens of answers", soft_wrap=True, highlight=False)
        console().print(f"llm-surgeon prune {model} --out OUT --calibration {out}", soft_wrap=True, highlight=False)
