"""The log and messages of this package at the terminal; set up by the owner of the process, never on import."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

# The first message of a command.
STARTING = "loading torch and transformers"


def error_console() -> Console:
    """A console on standard error, for messages and progress, without markup: names may hold brackets and colons."""
    return Console(stderr=True, markup=False, emoji=False)


def print_error(cause: str, remedy: str) -> None:
    """Print an error to standard error: its cause, and the remedy."""
    error_console().print(Text.assemble(("error:", "bold red"), f" {cause}\n{remedy}"), soft_wrap=True)


def log_to_stderr(process: int = 0) -> Console:
    """Send this package's log to standard error.

    Args:
        process: Number of this process, if there are several. All but the first log warnings only, with their number.

    Returns:
        The console of the log, for progress to be shown there too.
    """
    console = error_console()
    logger = logging.getLogger("llm_surgeon")
    logger.setLevel(logging.WARNING if process else logging.INFO)
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    handler.setFormatter(logging.Formatter(f"process {process}: %(message)s" if process else "%(message)s"))
    logger.handlers = [handler]
    return console


def quiet_transformers() -> None:
    """Turn off the loading bars of transformers. This imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
