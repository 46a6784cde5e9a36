"""The command ``recover``."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_surgeon.cli.options import with_options
from llm_surgeon.cli.shared import command_line, console, errors_as_messages
from llm_surgeon.recipe.recovery import RecoverConfig
from llm_surgeon.system.logs import STARTING, log_to_stderr, quiet_transformers
from llm_surgeon.system.torchrun import own_place

logger = logging.getLogger(__name__)

# Short help.
BRIEF = {
    "export": "An export, or another Hugging Face directory, a hub id, or demo.",
    "out": "Directory to make. OUT.run beside it holds states, from which the same command goes on.",
    "teacher": "The dense model that the export was made of; without it, the text alone is learnt.",
    "data": "Hub data set id, a .txt/.jsonl/.parquet file, or demo[:en|fr|es]; several as TEXT:SHARE each "
    "(default: demo).",
    "tokens": "Tokens to train on (default: 1M).",
    "seq_len": "Tokens per sequence (default: 512).",
    "batch_size": "Sequences of an optimizer step (default: 8).",
    "learning_rate": "Highest learning rate (default: 2e-4).",
    "adapters": "Rank of adapters to train in place of all weights (needs peft).",
    "evaluation": "Text to measure perplexity on; unset: held-out text of --data, none: skip.",
    "patience": "Evaluations without a better perplexity after which it stops.",
    "gradient_checkpointing": "Less memory, one more forward pass.",
    "device": "auto (default), cpu, cuda or cuda:N.",
}


def recover(
    export: Annotated[str, typer.Argument(help="An export, another Hugging Face directory, a hub id, or demo.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Directory to make; must not exist, or be empty. Until it is complete, OUT.run beside it holds "
            "states of the training: after an error or a kill, the same command goes on."
        ),
    ],
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The dense model that the export was made of, whose predictions are learnt; without it, the text's "
            "own next tokens are."
        ),
    ] = None,
    **given: Any,
) -> None:
    """Train EXPORT after pruning, on the predictions of its dense model; shapes and zeros stay as they are."""
    with errors_as_messages(partial(_how_to_go_on, out)):
        config = RecoverConfig.from_mapping({name: value for name, value in given.items() if value not in (None, [])})
        process = own_place().rank
        errors = log_to_stderr(process)
        logger.info(STARTING)
        # Imported late, see prune.
        from llm_surgeon.report.recovery_table import recovery_table
        from llm_surgeon.run.recover import recover as train
        from llm_surgeon.system.progress import RichProgress

        quiet_transformers()
        record = train(export, out, config, teacher=teacher, progress=RichProgress(errors), command=command_line())
        if process:
            return
        output = console()
        output.print(recovery_table(record))
        lines = [
            f"The reloaded result agrees with the model in memory. It is {out}, and loads as {export} does.",
            f"Record: {out / 'recovery.json'}",
        ]
        if (out / "report.html").is_file():
            lines[-1] += f", page: {out / 'report.html'}, model card: {out / 'README.md'}"
        for line in lines:
            output.print(line, soft_wrap=True, highlight=False)


recover = with_options(recover, RecoverConfig.model_fields)


def _how_to_go_on(out: Path) -> str:
    """Message after an interrupt: what the same command will do."""
    out = Path(os.path.abspath(out))
    directory = out.with_name(f"{out.name}.run")
    if (out / "recovery.json").is_file() and not directory.exists():
        return f"interrupted; the result at {out} is complete"
    states = list(directory.glob("state-*.safetensors"))
    more = "goes on from its last state" if states else "begins anew"
    return f"interrupted; nothing is at --out yet, and the same command {more}"
