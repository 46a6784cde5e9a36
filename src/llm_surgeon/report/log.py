"""This package's log at the terminal; for whoever owns the process, never set up on import."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler


def log_to_stderr() -> Console:
    """Send this package's log to standard error.

    Returns:
        The console that it goes to, for what else is shown there.
    """
    console = Console(stderr=True)
    logger = logging.getLogger("llm_surgeon")
    logger.setLevel(logging.INFO)
    logger.handlers = [RichHandler(console=console, show_time=False, show_path=False, show_level=False)]
    return console


def quiet_transformers() -> None:
    """Turn off the loading bars of transformers; imports it."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
