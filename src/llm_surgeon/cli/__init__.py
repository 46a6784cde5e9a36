"""The command ``llm-surgeon``: a thin shell over the public API, one file for each command."""

from __future__ import annotations

from typing import Annotated

import typer

from llm_surgeon import __version__
from llm_surgeon.cli import compare as comparing
from llm_surgeon.cli import evaluate as evaluating
from llm_surgeon.cli import plan as planning
from llm_surgeon.cli import prune as pruning
from llm_surgeon.cli import recover as recovering
from llm_surgeon.cli.bench import bench
from llm_surgeon.cli.chats import chats
from llm_surgeon.cli.compare_exports import compare_exports
from llm_surgeon.cli.dequantize import dequantize
from llm_surgeon.cli.export import export
from llm_surgeon.cli.helping import LiteralCommand, LiteralGroup, briefly, with_help_all
from llm_surgeon.cli.push import push
from llm_surgeon.cli.sample import sample
from llm_surgeon.cli.shared import faults_reported, interrupt_on_sigterm
from llm_surgeon.system.allocator import keep_freed_memory
from llm_surgeon.system.streams import standard_streams

app = typer.Typer(
    cls=LiteralGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=briefly(planning.BRIEF))(with_help_all(planning.plan))
app.command(cls=briefly(pruning.BRIEF))(with_help_all(pruning.prune))
app.command(cls=briefly(recovering.BRIEF))(with_help_all(recovering.recover))
app.command(cls=LiteralCommand)(export)
app.command(cls=LiteralCommand)(dequantize)
app.command(cls=LiteralCommand)(sample)
app.command(name="eval", cls=briefly(evaluating.BRIEF))(with_help_all(evaluating.evaluate))
app.command(cls=briefly(comparing.BRIEF))(with_help_all(comparing.compare))
app.command(cls=LiteralCommand)(bench)
app.command(cls=LiteralCommand)(compare_exports)
app.command(cls=LiteralCommand)(push)
app.command(cls=LiteralCommand)(chats)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llm-surgeon {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Make a pretrained language model really smaller: on disk, in memory, in time per token."""


def main() -> None:
    """Entry point of the ``llm-surgeon`` command."""
    keep_freed_memory()
    interrupt_on_sigterm()
    with standard_streams(), faults_reported():
        app()
