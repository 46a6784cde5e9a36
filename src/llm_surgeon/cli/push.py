"""The command ``push``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from llm_surgeon.cli.shared import console, errors_as_messages
from llm_surgeon.system.logs import STARTING, log_to_stderr
from llm_surgeon.system.torchrun import require_one_process

logger = logging.getLogger(__name__)


def push(
    export: Annotated[Path, typer.Argument(help="Directory of an export.")],
    repository: Annotated[str, typer.Argument(help="Repository of the hub, owner/name; made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Let everyone see it (default: private).")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be sent, without the network.")
    ] = False,
) -> None:
    """Upload EXPORT to the hub as REPOSITORY, which is private unless it is to be public."""
    with errors_as_messages():
        require_one_process("push")
        log_to_stderr()
        logger.info(STARTING)
        from llm_surgeon.run.upload import push as upload

        for line in upload(export, repository, public=public, dry_run=dry_run).lines():
            console().print(line, soft_wrap=True, highlight=False)
