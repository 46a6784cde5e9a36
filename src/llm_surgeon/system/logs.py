"""This package's log at the terminal; for whoever owns the process, never set up on import."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

# What a command says first.
STARTING = "loading torch and transformers"


def error_console() -> Console:
    """Standard error, for messages and progress. Text is shown as it is: names may hold brackets and colons."""
    return Console(stderr=True, markup=False, emoji=False)


def print_error(cause: str, remedy: str) -> None:
    """Say on standard error what went wrong and what to do about it."""
    error_console().print(Text.assemble(("error:", "bold red"), f" {cause}\n{remedy}"), soft_wrap=True)


def log_to_stderr(process: int = 0) -> Console:
    """Send this package's log to standard error.

    Args:
        process: Number of this process, if there are several: all but the first say warnings only, and who they are.

    Returns:
        The console that it goes to, for what else is shown there.
    """
    console = error_console()
    logger = logging.getLogger("llm_surgeon")
    logger.setLevel(logging.WARNING if process else logging.INFO)
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    handler.setFormatter(logging.Formatter(f"process {process}: %(message)s" if process else "%(message)s"))
    logger.handlers = [handler]
    return console


def quiet_transformers() -> None:
    """Turn off the loading bars of transformers; imports it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
