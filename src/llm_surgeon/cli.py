"""The command: a thin shell over the public API."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from llm_surgeon.config import PruneConfig, read_recipe, with_underscores
from llm_surgeon.errors import ConfigError, OutputError, SurgeonError
from llm_surgeon.methods import method_names
from llm_surgeon.pipeline.variants import SUFFIXES, parse_methods, settings_of
from llm_surgeon.report.log import log_to_stderr, quiet_transformers
from llm_surgeon.runtime import keep_freed_memory

if TYPE_CHECKING:
    from llm_surgeon.records import Evaluation

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
_DEMO = "demo"
_REPEAT = "Repeat for more."


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
    "Layer-wise methods": (
        *("scope", "layer_budget", "owl_multiple", "owl_spread", "permute"),
        *("score_alpha", "score_norm", "score_ratio", "score_activation", "sparsegpt_block"),
        *("refine", "refine_cycles", "refine_threshold", "refine_reweight"),
    ),
    "First-order corrections": tuple(name for name in PruneConfig.model_fields if name.startswith("lora")),
    "Texts": ("calibration", "samples", "seq_len", "evaluation", "eval_window", "eval_stride", "eval_tokens"),
}


def _option(name: str, more: str = "") -> Any:
    """The command-line option of a recipe's key, with the help and the default that the recipe gives it, and more."""
    field = PruneConfig.model_fields[name]
    default = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
    text = f"{field.description}" + (f" (default: {default})" if default not in (None, "") else "")
    panel = next((panel for panel, names in _PANELS.items() if name in names), "Machine")
    return typer.Option(help=f"{text} {more}".rstrip(), rich_help_panel=panel)


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
    scope: Annotated[str | None, _option("scope")] = None,
    layer_budget: Annotated[str | None, _option("layer_budget")] = None,
    owl_multiple: Annotated[float | None, _option("owl_multiple")] = None,
    owl_spread: Annotated[float | None, _option("owl_spread")] = None,
    score_alpha: Annotated[float | None, _option("score_alpha")] = None,
    score_norm: Annotated[float | None, _option("score_norm")] = None,
    score_ratio: Annotated[float | None, _option("score_ratio")] = None,
    score_activation: Annotated[bool | None, _option("score_activation")] = None,
    sparsegpt_block: Annotated[int | None, _option("sparsegpt_block")] = None,
    refine: Annotated[str | None, _option("refine")] = None,
    refine_cycles: Annotated[int | None, _option("refine_cycles")] = None,
    refine_threshold: Annotated[float | None, _option("refine_threshold")] = None,
    refine_reweight: Annotated[str | None, _option("refine_reweight")] = None,
    permute: Annotated[bool | None, _option("permute")] = None,
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

        quiet_transformers()
        errors = log_to_stderr()
        report = prune_checkpoint(model, out, config, progress=RichProgress(errors), command=_command())
        console = _console()
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
        from llm_surgeon.export.place import check_result_file
        from llm_surgeon.models.loading import load
        from llm_surgeon.pipeline.run import evaluate as measure
        from llm_surgeon.records import Evaluation
        from llm_surgeon.report.progress import RichProgress

        quiet_transformers()
        progress = RichProgress(log_to_stderr())
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

    console = _console()
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


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="A local Hugging Face directory, a hub id, or the word demo.")],
    out: Annotated[Path, typer.Option(help="Directory of the comparison: new, or one to go on with.")],
    methods: Annotated[
        str | None,
        typer.Option(
            help=f"Separated by commas: {', '.join(method_names())}; each with any of "
            f"{', '.join(f'+{suffix}' for suffix in SUFFIXES)}."
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML file of common options, and more variants under variants: (a name: its options)."),
    ] = None,
    sparsity: Annotated[list[float] | None, _option("sparsity", _REPEAT)] = None,
    structure: Annotated[list[str] | None, _option("structure", _REPEAT)] = None,
    shots: Annotated[int | None, _option("shots")] = None,
    calibration: Annotated[str | None, _option("calibration")] = None,
    samples: Annotated[int | None, _option("samples")] = None,
    seq_len: Annotated[int | None, _option("seq_len")] = None,
    batch_size: Annotated[int | None, _option("batch_size")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    device: Annotated[str | None, _option("device")] = None,
    dtype: Annotated[str | None, _option("dtype")] = None,
    precision: Annotated[str | None, _option("precision")] = None,
    evaluation: Annotated[str | None, _option("evaluation")] = None,
    eval_window: Annotated[int | None, _option("eval_window")] = None,
    eval_stride: Annotated[int | None, _option("eval_stride")] = None,
    eval_tokens: Annotated[int | None, _option("eval_tokens")] = None,
) -> None:
    """Run methods on identical tokens and write one table: perplexity, divergence, sparsity, seconds, peak memory.

    Each method under each setting is a process of its own. Run the same command again to go on after an interruption:
    what is finished is kept, what failed is tried again.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "out", "recipe", "methods")}
    with _errors_as_messages("interrupted; what is finished is kept, the same command goes on"):
        common: dict[str, Any] = read_recipe(recipe) if recipe else {}
        common |= {name: value for name, value in given.items() if value not in (None, [])}
        variants = _variants(methods, common.pop("variants", None))
        settings = settings_of(_listed(common, "structure"), _listed(common, "sparsity"))
        from llm_surgeon.pipeline.comparison import compare as run
        from llm_surgeon.report.comparison import comparison_tables

        log_to_stderr()
        result = run(model, out, variants, settings, common, show_progress=True, command=_command())
        console = _console()
        console.print(comparison_tables(result))
        console.print(
            f"Table: {out / 'comparison.md'}, picture: {out / 'comparison.png'}, numbers: {out / 'comparison.json'}",
            soft_wrap=True,
        )
        if any(cell.status == "failed" for cell in result.cells):
            raise typer.Exit(1)


def _variants(methods: str | None, more: Any) -> dict[str, dict[str, Any]]:
    """What ``--methods`` names, and the variants of the recipe."""
    named = parse_methods(methods or "")
    if more is None:
        return named
    if not isinstance(more, dict) or not all(isinstance(options, dict) for options in more.values()):
        raise ConfigError(
            "The recipe's variants are not a mapping of names to options.", "Write name: {option: value}."
        )
    variants = {str(name): with_underscores(options) for name, options in more.items()}
    both = next((name for name in variants if name in named), None)
    if both is not None:
        raise ConfigError(
            f"{both!r} is a variant of the recipe and one of --methods.", "Give the variant another name."
        )
    return named | variants


def _listed(options: dict[str, Any], name: str) -> list[Any]:
    """Take an option out that may have several values; the recipe's default if it is not there."""
    value = options.pop(name, PruneConfig.model_fields[name].default)
    values = value if isinstance(value, list) else [value]
    kind = (str,) if name == "structure" else (int, float)
    wrong = next((value for value in values if not isinstance(value, kind)), None)
    if wrong is not None:
        # YAML reads 2:4 as a number to the base of 60.
        raise ConfigError(f"{name}: {wrong!r} is not of the right kind.", "Quote N:M in a recipe: '2:4'.")
    return values


def _command() -> str:
    return shlex.join(["llm-surgeon", *sys.argv[1:]])


def _console() -> Console:
    # A log file has no width of its own; the tables need 100 columns.
    return Console() if sys.stdout.isatty() else Console(width=100)


@contextmanager
def _errors_as_messages(interrupted: str = "interrupted; nothing was written") -> Iterator[None]:
    """A user's mistake is two sentences and an exit status, not a stack trace."""
    try:
        yield
    except SurgeonError as error:
        _print_error(error.cause, error.remedy)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print(interrupted)
        raise typer.Exit(130) from None


def _print_error(cause: str, remedy: str) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {_escape(cause)}\n{_escape(remedy)}", soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
