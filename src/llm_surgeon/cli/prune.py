"""The command ``prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_surgeon.cli.shared import command_line, config_of, console, errors_as_messages, with_recipe
from llm_surgeon.report.log import log_to_stderr, quiet_transformers
from llm_surgeon.torchrun import place


@with_recipe
def prune(
    model: Annotated[str, typer.Argument(help="A local Hugging Face directory, a hub id, or the word demo.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Directory to make; must not exist, or be empty. Until it is complete, OUT.run beside it holds "
            "checkpoints: after an error or a kill, the same command continues after the last complete shot."
        ),
    ],
    **given: Any,
) -> None:
    """Prune MODEL's linear layers, correct what is left, export it and check the export."""
    with errors_as_messages("interrupted; nothing is at --out yet"):
        config = config_of(given)
        # Imported late: torch and transformers take seconds, and a wrong option should not wait for them.
        from llm_surgeon.pipeline.run import prune_checkpoint
        from llm_surgeon.report.progress import RichProgress
        from llm_surgeon.report.table import summary_table

        quiet_transformers()
        process = place().rank
        errors = log_to_stderr(process)
        report = prune_checkpoint(model, out, config, progress=RichProgress(errors), command=command_line())
        if process:
            return
        output = console()
        output.print(summary_table(report))
        output.print(
            f"The reloaded export agrees with the model in memory. Report: {out / 'report.html'} (numbers: "
            f"{out / 'report.json'}), model card: {out / 'README.md'}",
            soft_wrap=True,
        )
