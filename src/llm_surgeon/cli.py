"""The command: a thin shell over the public API."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from llm_surgeon.config import PruneConfig, read_recipe
from llm_surgeon.errors import ConfigError, OutputError, SurgeonError
from llm_surgeon.runtime import keep_freed_memory

if TYPE_CHECKING:
    from llm_surgeon.records import Evaluation

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
_DEMO = "demo"


def main() -> None:
    """Entry point of the ``llm-surgeon`` command."""
    keep_freed_memory()
    app()


_PANELS = {
    "What to remove": ("sparsity", "structure", "method", "shots", "rank_by", "ignore", "export_shots"),
    "Curvature and update": (
        *("curvature", "fisher", "fisher_samples", "kronecker_iterations"),
        *("dampening_a", "dampening_g", "max_correlations", "update_steps"),
    ),
    "First-order corrections": tuple(name for name in PruneConfig.model_fields if name.startswith("lora")),
    "Texts": ("calibration", "samples", "seq_len", "evaluation", "eval_window", "eval_stride", "eval_tokens"),
}


def _option(name: str) -> Any:
    """The command-line option of a recipe's key, with the help and the default that the recipe gives it."""
    field = PruneConfig.model_fields[name]
    default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
    text = f"{field.description}" + (f" (default: {default})" if default not in (None, "") else "")
    panel = next((panel for panel, names in _PANELS.items() if name in names), "Machine")
    return typer.Option(help=text, rich_help_panel=panel)


def _task_option(text: str, least: int | None = None) -> Any:
    """An option of ``eval`` that is about tasks."""
    return typer.Option(help=text, min=least, rich_help_panel="Tasks (need the extra: tasks)")


@app.callback()
def _root() -> None:
    """Make a pretrained language model really smaller: on disk, in memory, in time per token."""


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="A local Hugging Face directory, a hub id, or the word demo.")],
    out: Annotated[Path, typer.Option(help="Directory to make; must not exist, or be empty.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML file of these options; the command line overrides.")] = None,
    sparsity: Annotated[float | None, _option("sparsity")] = None,
    structure: Annotated[str | None, _option("structure")] = None,
    method: Annotated[str | None, _option("method")] = None,
    curvature: Annotated[str | None, _option("curvature")] = None,
    fisher: Annotated[str | None, _option("fisher")] = None,
    fisher_samples: Annotated[int | None, _option("fisher_samples")] = None,
    kronecker_iterations: Annotated[int | None, _option("kronecker_iterations")] = None,
    shots: Annotated[int | None, _option("shots")] = None,
    rank_by: Annotated[str | None, _option("rank_by")] = None,
    calibration: Annotated[str | None, _option("calibration")] = None,
    samples: Annotated[int | None, _option("samples")] = None,
    seq_len: Annotated[int | None, _option("seq_len")] = None,
    batch_size: Annotated[int | None, _option("batch_size")] = None,
    dampening_a: Annotated[float | None, _option("dampening_a")] = None,
    dampening_g: Annotated[float | None, _option("dampening_g")] = None,
    max_correlations: Annotated[int | None, _option("max_correlations")] = None,
    update_steps: Annotated[int | None, _option("update_steps")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    device: Annotated[str | None, _option("device")] = None,
    dtype: Annotated[str | None, _option("dtype")] = None,
    precision: Annotated[str | None, _option("precision")] = None,
    lora: Annotated[bool | None, _option("lora")] = None,
    lora_rank: Annotated[int | None, _option("lora_rank")] = None,
    lora_learning_rate: Annotated[float | None, _option("lora_learning_rate")] = None,
    lora_steps: Annotated[int | None, _option("lora_steps")] = None,
    lora_final_steps: Annotated[int | None, _option("lora_final_steps")] = None,
    lora_share: Annotated[float | None, _option("lora_share")] = None,
    export_shots: Annotated[list[int] | None, _option("export_shots")] = None,
    evaluation: Annotated[str | None, _option("evaluation")] = None,
    eval_window: Annotated[int | None, _option("eval_window")] = None,
    eval_stride: Annotated[int | None, _option("eval_stride")] = None,
    eval_tokens: Annotated[int | None, _option("eval_tokens")] = None,
    ignore: Annotated[list[str] | None, _option("ignore")] = None,
) -> None:
    """Prune MODEL's linear layers by second-order costs, correct what is left, export it and check the export."""
    given = {name: value for name, value in locals().items() if name not in ("model", "out", "recipe")}
    with _errors_as_messages():
        options: dict[str, Any] = read_recipe(recipe) if recipe else {}
        options |= {name: value for name, value in given.items() if value is not None}
        config = PruneConfig.from_mapping(options)
        # Imported late: torch and transformers take seconds, and a wrong option should not wait for them.
        from llm_surgeon.pipeline.run import prune_checkpoint
        from llm_surgeon.report.progress import RichProgress
        from llm_surgeon.report.table import summary_table

        errors = _log_to_stderr()
        report = prune_checkpoint(
            model, out, config, progress=RichProgress(errors), command=shlex.join(["llm-surgeon", *sys.argv[1:]])
        )
        # A log file has no width of its own; the table needs 100 columns.
        console = Console() if sys.stdout.isatty() else Console(width=100)
        console.print(summary_table(report))
        console.print(
            f"The reloaded export agrees with the model in memory. Report: {out / 'report.html'} (numbers: "
            f"{out / 'report.json'}), model card: {out / 'README.md'}",
            soft_wrap=True,
        )


@app.command(name="eval")
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
    tasks: Annotated[str | None, _task_option("Tasks of lm-eval to measure, separated by commas.")] = None,
    tasks_path: Annotated[
        Path | None, _task_option("Directory with task files (YAML) of your own; their Python code is run.")
    ] = None,
    few_shot: Annotated[int | None, _task_option("Solved examples before each question (default: 0).", 0)] = None,
    limit: Annotated[int | None, _task_option("The first N samples of each task only (default: all).", 1)] = None,
    batch_size: Annotated[int | None, _task_option("Requests of tasks per pass (default: 1).", 1)] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the results to; must not exist.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")] = "auto",
    precision: Annotated[str, typer.Option(help="Arithmetic: bfloat16 (autocast) or float32.")] = "bfloat16",
) -> None:
    """Measure MODEL: perplexity of a text, accuracy on tasks, or both. Runs modelling code that the export brings."""
    with _errors_as_messages():
        if tasks is None and any(option is not None for option in (tasks_path, few_shot, limit, batch_size)):
            raise ConfigError("Options of tasks are given, but no tasks.", "Name tasks, or leave those options out.")
        from llm_surgeon.evaluation.tasks import evaluate_tasks, find_tasks
        from llm_surgeon.export.save import check_result_file
        from llm_surgeon.models.loading import load
        from llm_surgeon.pipeline.run import evaluate as measure
        from llm_surgeon.records import Evaluation
        from llm_surgeon.report.progress import RichProgress

        progress = RichProgress(_log_to_stderr())
        if out is not None:
            check_result_file(out)
        selection = None if tasks is None else find_tasks(tasks.split(","), tasks_path)
        network, tokenizer = load(model, dtype, device)
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
                precision=precision,
                progress=progress,
            )
        _show(Evaluation(model=model, perplexity=perplexity, tasks=scores), out)


def _show(evaluation: Evaluation, out: Path | None) -> None:
    """Print what was measured and write it to a file; end with status 1 if a task failed.

    Raises:
        OutputError: If the file cannot be written.
    """
    from llm_surgeon.report.task_table import task_table

    console = Console() if sys.stdout.isatty() else Console(width=100)
    if (result := evaluation.perplexity) is not None:
        console.print(
            f"perplexity {result.perplexity:.3f} on {result.data}: {result.tokens:,} tokens scored, window "
            f"{result.window}, stride {result.stride}, {result.precision}",
            soft_wrap=True,
        )
    failures = () if evaluation.tasks is None else evaluation.tasks.failures
    if evaluation.tasks is not None:
        console.print(task_table(evaluation.model, evaluation.tasks))
    if out is not None:
        try:
            out.write_text(evaluation.model_dump_json(indent=2) + "\n", encoding="utf8")
        except OSError as error:
            raise OutputError(f"{out} cannot be written: {error.strerror}.", "Give another --out.") from None
    for failure in failures:
        _print_error(failure.cause, failure.remedy)
    if failures:
        raise typer.Exit(1)


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """A user's mistake is two sentences and an exit status, not a stack trace."""
    try:
        yield
    except SurgeonError as error:
        _print_error(error.cause, error.remedy)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written")
        raise typer.Exit(130) from None


def _print_error(cause: str, remedy: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {_escape(cause)}\n{_escape(remedy)}", soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _log_to_stderr() -> Console:
    """Send this package's log to standard error, and quiet the loading bars of transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    console = Console(stderr=True)
    logger = logging.getLogger("llm_surgeon")
    logger.setLevel(logging.INFO)
    logger.handlers = [RichHandler(console=console, show_time=False, show_path=False, show_level=False)]
    return console
