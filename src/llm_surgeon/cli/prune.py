"""The command ``prune``."""

from __future__ import annotations

import logging
import os
import re
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_surgeon.cli.options import COMMON, config_of, with_recipe
from llm_surgeon.cli.shared import command_line, console, errors_as_messages
from llm_surgeon.errors import ConfigError, ExportMismatchError, UploadError
from llm_surgeon.system.logs import STARTING, log_to_stderr, quiet_transformers
from llm_surgeon.system.torchrun import own_place

if TYPE_CHECKING:
    from rich.console import Console

    from llm_surgeon.records import ExportRecord, PruneReport

logger = logging.getLogger(__name__)

# Short help.
BRIEF = {
    "model": "A Hugging Face directory, a hub id, or the word demo.",
    "out": "Directory to make. OUT.run beside it holds checkpoints, from which the same command continues.",
    **COMMON,
}


@with_recipe
def prune(
    model: Annotated[str, typer.Argument(help="A local Hugging Face directory, a hub id, or the word demo.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Directory to make; must not exist, or be empty. Until it is complete, OUT.run beside it holds "
            "checkpoints: after an error or a kill, the same command continues after the last complete shot, or inside "
            "a shot that takes minutes."
        ),
    ],
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            help="Repository of the hub, owner/name, to upload the export to when it is checked; private. "
            "`llm-surgeon push` does it later, in public, or as a dry run.",
        ),
    ] = None,
    **given: Any,
) -> None:
    """Prune MODEL's linear layers, correct what is left, export it and check the export."""
    with errors_as_messages(partial(_how_to_go_on, out)):
        start = time.perf_counter()
        config = config_of(given)
        process = own_place().rank
        errors = log_to_stderr(process)
        logger.info(STARTING)
        # Imported late: torch and transformers take seconds, and a wrong option should not wait for them.
        from llm_surgeon.report.recovery_table import recovery_table
        from llm_surgeon.report.table import summary_table
        from llm_surgeon.run.run import prune_checkpoint
        from llm_surgeon.run.upload import check_hub
        from llm_surgeon.system.progress import RichProgress

        quiet_transformers()
        if push_to_hub is not None:
            check_hub(push_to_hub)
        report = prune_checkpoint(model, out, config, progress=RichProgress(errors), command=command_line())
        if process:
            return
        output = console()
        output.print(summary_table(report))
        if report.recovery is not None:
            output.print(recovery_table(report.recovery))
        assert report.export is not None, "a checkpoint is pruned into an export"
        # Not wrapped nor coloured: some lines are to be pasted.
        for line in _closing(report, report.export, time.perf_counter() - start, output.encoding):
            output.print(line, soft_wrap=True, highlight=False)
        if report.export.failures:
            raise ExportMismatchError(report.export.failures[0], f"All else of the export at {out} is complete.")
        if push_to_hub is not None:
            _push(out, push_to_hub, output)


def _push(out: Path, repository: str, output: Console) -> None:
    """Upload a finished export, and say what was sent.

    Raises:
        UploadError: If that fails, with the command that sends it later.
    """
    from llm_surgeon.run.upload import push

    try:
        sent = push(out, repository)
    except (UploadError, ConfigError) as error:
        remedy = f"The export at {out} is complete: llm-surgeon push {out} {repository}"
        raise UploadError(error.cause, f"{error.remedy} {remedy}") from None
    for line in sent.lines():
        output.print(line, soft_wrap=True, highlight=False)


def _how_to_go_on(out: Path) -> str:
    """Message after an interrupt: what the same command will do."""
    if (out / "report.json").is_file():
        return f"interrupted; the export at {out} is complete"
    out = Path(os.path.abspath(out))
    # The names of the files have to do, as the interrupt may come before the modules that read them are imported.
    times = {path.name: path.stat().st_mtime_ns for path in out.with_name(f"{out.name}.run").glob("*.sha256")}
    shots = [int(found[1]) for found in (re.fullmatch(r"shot-(\d+)\.sha256", name) for name in times) if found]
    more = f"continues after shot {max(shots)}" if shots else "begins anew"
    if max(times, key=times.__getitem__, default="").startswith("inside-"):
        more = f"continues inside shot {max(shots, default=0) + 1}"
    return f"interrupted; nothing is at --out yet, and the same command {more}"


def _closing(report: PruneReport, export: ExportRecord, seconds: float, encoding: str) -> list[str]:
    """Lines below the table: time, sizes, path of the export, the code that loads it, and paths of report and card."""
    from llm_surgeon.report.loading import loading_lines, reloaded
    from llm_surgeon.report.table import scaled_bytes

    out = Path(export.path)
    others = [form for form in export.formats if form.directory] if export.pretrained else export.formats[1:]
    # Absolute, so that the lines work in any directory; an escape if the terminal does not have a character.
    place = repr(export.path) if _can_show(export.path, encoding) else ascii(export.path)
    return [
        f"This took {_duration(seconds)}. Weights: {scaled_bytes(export.dense_weight_bytes)} before, "
        f"{scaled_bytes(export.weight_bytes)} after.",
        f"The reloaded export agrees with the model in memory. It is {out}, and these lines load it:",
        "",
        *loading_lines(report, place),
        "",
        *(f"{out / form.directory}: {scaled_bytes(form.weight_bytes)}. {reloaded(form)}" for form in others),
        f"Report: {out / 'report.html'} (numbers: {out / 'report.json'}), model card: {out / 'README.md'}",
    ]


def _can_show(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _duration(seconds: float) -> str:
    """Write seconds as ``1 h 2 min 3 s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = (hours, "h"), (minutes, "min"), (rest, "s")
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"
