"""The command ``bench``."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from llm_surgeon.cli.shared import (
    Device,
    Dtype,
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


def bench(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Exports, Hugging Face directories, hub ids, or the word demo; the first is the "
            "reference, unless --against names one.",
            metavar="MODEL...",
        ),
    ],
    against: Annotated[
        str | None, typer.Option(help="The dense model to compare with (default: the first MODEL).")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences side by side. Repeat for more (default: 1, 8).")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens per sequence of the prefill.")] = 512,
    generate: Annotated[int, typer.Option(min=1, help="Tokens per sequence decoded after it.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Alternating pairs of runs for each batch.")] = 5,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Measure the speed once more with torch.compile.")
    ] = False,
    out: ResultFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure speed, peak memory and loading time of each MODEL, the speed in alternating pairs with a reference.

    If a model fails, the others go on, and the exit status is 1.
    """
    with errors_as_messages():
        require_one_process("bench")
        log_to_stderr()
        logger.info(STARTING)
        from llm_surgeon.benchmark.measuring import bench as measure
        from llm_surgeon.report.bench_table import bench_tables, failures
        from llm_surgeon.system.files import check_result_file

        quiet_transformers()
        if out is not None:
            check_result_file(out)
        result = measure(
            models,
            against,
            batch or (1, 8),
            prompt=prompt,
            generate=generate,
            repeats=repeats,
            compiled=compiled,
            device=device,
            dtype=dtype,
            command=command_line(),
            trust_remote_code=trust_remote_code,
        )
        console().print(bench_tables(result))
        if out is not None:
            write_result(out, result)
        if failures(result):
            raise typer.Exit(1)
