"""The command ``export``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_surgeon.cli.shared import Dtype, TrustRemoteCode, console, errors_as_messages
from llm_surgeon.recipe.formats import FORMATS
from llm_surgeon.system.logs import STARTING, log_to_stderr, quiet_transformers
from llm_surgeon.system.torchrun import require_one_process

if TYPE_CHECKING:
    from llm_surgeon.records import FormatRecord

logger = logging.getLogger(__name__)


def export(
    model: Annotated[str, typer.Argument(help="An export, a Hugging Face directory, a hub id, or the word demo.")],
    formats: Annotated[
        list[str],
        typer.Option(
            "--format",
            help=f"Format to write: {', '.join(name for name in FORMATS if name != 'hf')}; repeat for more.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory for the directories of the formats (default: that of the export)."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; computes the logits to compare with.")
    ] = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write MODEL, an export or another checkpoint, in further formats, and check the files in their engine."""
    with errors_as_messages():
        require_one_process("export")
        log_to_stderr()
        logger.info(STARTING)
        # Imported late, see prune.
        from llm_surgeon.run.convert import export_as

        quiet_transformers()
        records = export_as(model, formats, out, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        for record in records:
            console().print(_line(record, (out or Path(model)) / record.directory))


def _line(record: FormatRecord, directory: Path) -> str:
    """One format in a few lines: directory, bytes, and how far its engine is from the model."""
    from llm_surgeon.report.loading import reloaded
    from llm_surgeon.report.table import scaled_bytes

    loading = "\n".join(line.replace("{place}", repr(str(directory))) for line in record.loading)
    return f"{directory}: {scaled_bytes(record.weight_bytes)}\n{reloaded(record)}\n\n{loading}\n"
