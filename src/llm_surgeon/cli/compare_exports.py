"""The command ``compare-exports``."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from llm_surgeon.cli.shared import (
    Device,
    Dtype,
    Precision,
    ResultFile,
    TrustRemoteCode,
    command_line,
    console,
    errors_as_messages,
    write_result,
)
from llm_surgeon.system.logs import STARTING, log_to_stderr, quiet_transformers
from llm_surgeon.system.torchrun import require_one_process

logger = logging.getLogger(__name__)


def compare_exports(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Exports, Hugging Face directories, hub ids, or the word demo; divergences are from the first.",
            metavar="MODEL...",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to measure on: hub data set id, a .txt/.jsonl/.parquet file, or demo[:en|fr|es]; repeat for "
            "more (default: demo)."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text, at most.")] = 20_480,
    bos: Annotated[
        str, typer.Option(help="Whether windows begin with the token that begins a text: auto, always or never.")
    ] = "auto",
    out: ResultFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = "bfloat16",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure each MODEL on the same tokens: size, perplexity, and divergence from the first."""
    with errors_as_messages():
        require_one_process("compare-exports")
        progress_console = log_to_stderr()
        logger.info(STARTING)
        from llm_surgeon.report.exports_table import exports_table
        from llm_surgeon.run.compare_exports import compare_exports as measure
        from llm_surgeon.system.files import check_result_file
        from llm_surgeon.system.progress import RichProgress

        quiet_transformers()
        if out is not None:
            check_result_file(out)
        found = measure(
            models,
            data or ("demo",),
            window=window,
            max_tokens=tokens,
            bos=bos,  # type: ignore[arg-type]  # what is none of them is refused with a message
            precision=precision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=RichProgress(progress_console),
            command=command_line(),
        )
        console().print(exports_table(found))
        if out is not None:
            write_result(out, found)
