"""The command ``eval``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_surgeon.cli.shared import (
    Device,
    Dtype,
    Precision,
    ResultFile,
    TrustRemoteCode,
    console,
    errors_as_messages,
    write_result,
)
from llm_surgeon.errors import ConfigError
from llm_surgeon.system.logs import STARTING, log_to_stderr, print_error, quiet_transformers
from llm_surgeon.system.torchrun import require_one_process

if TYPE_CHECKING:
    from llm_surgeon.records import Evaluation

logger = logging.getLogger(__name__)

_DEMO = "demo"
# Short help.
BRIEF = {
    "model": "An export, a Hugging Face directory, a hub id, or the word demo.",
    "data": "Text to measure perplexity on: hub data set id, a .txt/.jsonl/.parquet file, or demo[:en|fr|es] "
    "(default: demo; with --tasks: none).",
    "window": "Tokens per window (default: 1024).",
    "stride": "Tokens between windows (default: the window).",
    "tokens": "Tokens of the text, at most (default: 20480).",
    "tasks": "Tasks of lm-eval, or groups of them, separated by commas.",
    "few_shot": "Solved examples before each question (default: 0).",
    "limit": "The first N samples of each task only (default: all).",
    "out": "JSON file to write the results to; must not exist.",
    "device": "auto (default), cpu, cuda or cuda:N.",
    "dtype": "auto (as stored), float32, bfloat16 or float16.",
}


def _task_option(text: str, *names: str, least: int | None = None, most: int | None = None) -> Any:
    """Option of ``eval`` for tasks, in a panel of its own."""
    return typer.Option(*names, help=text, min=least, max=most, rich_help_panel="Tasks (need the extra: tasks)")


def evaluate(
    model: Annotated[str, typer.Argument(help="An export, a Hugging Face directory, a hub id, or the word demo.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Text to measure perplexity on: hub data set id, a .txt/.jsonl/.parquet, or demo[:en|fr|es] "
            "(default: demo; with --tasks: none)."
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows (default: the window).")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = 20_480,
    bos: Annotated[
        str,
        typer.Option(
            help="Whether each window begins with the token that begins a text: auto (where the tokenizer puts one), "
            "always or never (as published figures of Llama and OPT have it)."
        ),
    ] = "auto",
    tasks: Annotated[
        str | None, _task_option("Tasks of lm-eval to measure, or groups of them, separated by commas.")
    ] = None,
    tasks_path: Annotated[
        Path | None, _task_option("Directory with task files (YAML) of your own; their Python code is run.")
    ] = None,
    few_shot: Annotated[int | None, _task_option("Solved examples before each question (default: 0).", least=0)] = None,
    apply_chat_template: Annotated[
        bool, _task_option("Put questions and examples into the tokenizer's chat template.", "--apply-chat-template")
    ] = False,
    seed: Annotated[
        int | None,
        _task_option("Seed of the solved examples and of all else tasks draw (default: 0).", least=0, most=2**32 - 1),
    ] = None,
    limit: Annotated[int | None, _task_option("The first N samples of each task only (default: all).", least=1)] = None,
    batch_size: Annotated[int | None, _task_option("Requests of tasks per pass (default: 1).", least=1)] = None,
    out: ResultFile = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    precision: Precision = "bfloat16",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure MODEL: perplexity of a text, accuracy on tasks, or both."""
    with errors_as_messages():
        require_one_process("eval")
        of_tasks = (tasks_path, few_shot, apply_chat_template or None, seed, limit, batch_size)
        if tasks is None and any(option is not None for option in of_tasks):
            raise ConfigError("Options of tasks are given, but no tasks.", "Name tasks, or leave those options out.")
        progress_console = log_to_stderr()
        logger.info(STARTING)
        from llm_surgeon.evaluation.tasks import check_chat_template, evaluate_tasks, find_tasks
        from llm_surgeon.models.loading import load
        from llm_surgeon.records import Evaluation
        from llm_surgeon.run.run import evaluate as measure
        from llm_surgeon.system.files import check_result_file
        from llm_surgeon.system.progress import RichProgress

        quiet_transformers()
        progress = RichProgress(progress_console)
        if out is not None:
            check_result_file(out)
        selection = None if tasks is None else find_tasks(tasks.split(","), tasks_path)
        network, tokenizer = load(model, dtype, device, trust_remote_code)
        if apply_chat_template:
            check_chat_template(tokenizer)
        perplexity = scores = None
        if selection is None or data is not None:
            perplexity = measure(
                network,
                tokenizer,
                data or _DEMO,
                window=window,
                stride=stride,
                max_tokens=tokens,
                precision=precision,
                bos=bos,  # type: ignore[arg-type]  # what is none of them is refused with a message
                progress=progress,
            )
        if selection is not None:
            scores = evaluate_tasks(
                network,
                tokenizer,
                selection,
                limit=limit,
                shots=few_shot or 0,
                batch_size=batch_size or 1,
                seed=seed or 0,
                apply_chat_template=apply_chat_template,
                precision=precision,
                progress=progress,
            )
        _show(Evaluation(model=model, perplexity=perplexity, tasks=scores), out)


def _show(evaluation: Evaluation, out: Path | None) -> None:
    """Print the measures and write them to a file; end with status 1 if a task failed.

    Raises:
        OutputError: If the file cannot be written.
    """
    from llm_surgeon.report.task_table import task_table

    output = console()
    if (result := evaluation.perplexity) is not None:
        begun = ", each begun with the token that begins a text" if result.bos else ""
        output.print(
            f"perplexity {result.perplexity:.3f} on {result.data}: {result.tokens:,} tokens scored, window "
            f"{result.window}{begun}, stride {result.stride}, {result.precision}",
            soft_wrap=True,
        )
    failures = () if evaluation.tasks is None else evaluation.tasks.failures
    if evaluation.tasks is not None:
        output.print(task_table(evaluation.model, evaluation.tasks))
    if out is not None:
        write_result(out, evaluation)
    for failure in failures:
        print_error(failure.cause, failure.remedy)
    if failures:
        raise typer.Exit(1)
