"""The command ``dequantize``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from llm_surgeon.cli.shared import TrustRemoteCode, console, errors_as_messages
from llm_surgeon.system.logs import STARTING, log_to_stderr, quiet_transformers
from llm_surgeon.system.torchrun import require_one_process

logger = logging.getLogger(__name__)


def dequantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or a hub id, with weights in FP8 or MXFP4.")],
    out: Annotated[Path, typer.Option(help="Directory to make; must not exist, or be empty.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write MODEL, whose weights are stored in eight or four bits, in 16 bits, so that it can be pruned."""
    with errors_as_messages():
        require_one_process("dequantize")
        log_to_stderr()
        logger.info(STARTING)
        # Imported late, see prune.
        from llm_surgeon.run import dequantising

        quiet_transformers()
        place = dequantising.dequantize(model, out, dtype=dtype, trust_remote_code=trust_remote_code)
        console().print(
            f"{place}: the same model in {dtype}. Prune it: llm-surgeon prune {place} --out DIR", soft_wrap=True
        )
