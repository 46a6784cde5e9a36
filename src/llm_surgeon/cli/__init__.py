"""The command: a thin shell over the public API, a file for each of its commands."""

from __future__ import annotations

import typer

from llm_surgeon.cli.bench import bench
from llm_surgeon.cli.compare import compare
from llm_surgeon.cli.evaluate import evaluate
from llm_surgeon.cli.plan import plan
from llm_surgeon.cli.prune import prune
from llm_surgeon.runtime import keep_freed_memory

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(plan)
app.command()(prune)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(bench)


@app.callback()
def _root() -> None:
    """Make a pretrained language model really smaller: on disk, in memory, in time per token."""


def main() -> None:
    """Entry point of the ``llm-surgeon`` command."""
    keep_freed_memory()
    app()
