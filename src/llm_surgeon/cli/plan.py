"""The command ``plan``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_surgeon.cli.options import COMMON, config_of, with_recipe
from llm_surgeon.cli.shared import console, errors_as_messages, write_result
from llm_surgeon.system.logs import STARTING, log_to_stderr, quiet_transformers
from llm_surgeon.system.torchrun import require_one_process

logger = logging.getLogger(__name__)

# Short help.
BRIEF = {
    "model": "A Hugging Face directory, a hub id, or the word demo.",
    "probe": "Load the model after all, and time and measure one batch.",
    "processes": "Processes that are to share the run (default: 1).",
    "out": "JSON file to write the plan to; must not exist.",
    **COMMON,
}


@with_recipe
def plan(
    model: Annotated[str, typer.Argument(help="A local Hugging Face directory, a hub id, or the word demo.")],
    probe: Annotated[
        bool, typer.Option("--probe", help="Load the model after all, and time and measure one batch.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Processes of this machine that are to share the run.")] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the plan to; must not exist.")] = None,
    **given: Any,
) -> None:
    """Say what pruning MODEL will take and give, by the options of prune, without loading its weights."""
    with errors_as_messages():
        require_one_process("plan")
        config = config_of(given)
        log_to_stderr()
        logger.info(STARTING)
        # Imported late, see prune.
        from llm_surgeon.planning.foresee import warn_if_short
        from llm_surgeon.report.plan_table import plan_tables
        from llm_surgeon.run.run import plan as foresee
        from llm_surgeon.system.files import check_result_file

        quiet_transformers()
        if out is not None:
            check_result_file(out)
        foreseen = foresee(model, config, probe, processes)
        console().print(plan_tables(foreseen))
        warn_if_short(foreseen)
        if out is not None:
            write_result(out, foreseen)
