"""The command ``sample``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from llm_surgeon.cli.shared import Device, Dtype, ResultFile, TrustRemoteCode, console, errors_as_messages, write_result
from llm_surgeon.errors import ConfigError
from llm_surgeon.system.logs import STARTING, log_to_stderr, quiet_transformers
from llm_surgeon.system.torchrun import require_one_process

logger = logging.getLogger(__name__)


def sample(
    model: Annotated[str, typer.Argument(help="An export, a Hugging Face directory, a hub id, or the word demo.")],
    against: Annotated[str | None, typer.Option(help="Model to compare with, as the dense one.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Prompt to write for; repeat for more (default: a fixed set).")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with a prompt on each line.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 48,
    temperature: Annotated[float, typer.Option(help="Temperature of the drawn texts.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Share of the probability that the drawn texts come from.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the drawn texts.")] = 0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Put prompts into the chat template (default: if there is one)."),
    ] = None,
    page: Annotated[bool, typer.Option("--page", help="Put the texts on the page of the run in MODEL too.")] = False,
    out: ResultFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show what MODEL writes for prompts, greedily and drawn, beside what another model writes."""
    with errors_as_messages():
        require_one_process("sample")
        progress_console = log_to_stderr()
        asked = [*(prompt or ()), *(_lines(prompts) if prompts else ())]
        logger.info(STARTING)
        from llm_surgeon.report.sample_table import sample_tables
        from llm_surgeon.run.sampling import sample as write
        from llm_surgeon.system.files import check_result_file
        from llm_surgeon.system.progress import RichProgress

        quiet_transformers()
        if out is not None:
            check_result_file(out)
        found = write(
            model,
            against,
            prompts=asked,
            chat=chat,
            tokens=tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            page=page,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=RichProgress(progress_console),
        )
        console().print(sample_tables(found))
        if out is not None:
            write_result(out, found)


def _lines(path: Path) -> list[str]:
    """Prompts of a file.

    Raises:
        ConfigError: If it cannot be read, or holds none.
    """
    try:
        found = [line for line in path.read_text(encoding="utf8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The prompts in {path} cannot be read: {error}.", "Give a text file in UTF-8.") from None
    if not found:
        raise ConfigError(f"{path} holds no prompt.", "Write one on each line.")
    return found
