"""The command: a thin shell over the public API."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from llm_surgeon.config import PruneConfig, read_recipe
from llm_surgeon.errors import SurgeonError
from llm_surgeon.runtime import keep_freed_memory

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
    "Layer-wise methods": (
        *("scope", "layer_budget", "owl_multiple", "owl_spread", "permute"),
        *("score_alpha", "score_norm", "score_ratio", "score_activation", "sparsegpt_block"),
        *("refine", "refine_cycles", "refine_threshold", "refine_reweight"),
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
    data: Annotated[str, typer.Option(help="Hub data set id, a .txt/.jsonl/.parquet, or demo[:en|fr|es].")] = _DEMO,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    stride: Annotated[int | None, typer.Option(min=1, help="Tokens between windows (default: the window).")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = 20_480,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")] = "auto",
    precision: Annotated[str, typer.Option(help="Arithmetic: bfloat16 (autocast) or float32.")] = "bfloat16",
) -> None:
    """Measure the token perplexity of MODEL on a text. Runs modelling code that the export brings along."""
    with _errors_as_messages():
        from llm_surgeon.models.loading import load
        from llm_surgeon.pipeline.run import evaluate as measure
        from llm_surgeon.report.progress import RichProgress

        progress = RichProgress(_log_to_stderr())
        network, tokenizer = load(model, dtype, device)
        result = measure(
            network,
            tokenizer,
            data,
            window=window,
            stride=stride,
            max_tokens=tokens,
            precision=precision,
            progress=progress,
        )
        Console().print(
            f"perplexity {result.perplexity:.3f} on {result.data}: {result.tokens:,} tokens scored, window "
            f"{result.window}, stride {result.stride}, {result.precision}",
            soft_wrap=True,
        )


@contextmanager
def _errors_as_messages() -> Iterator[None]:
    """A user's mistake is two sentences and an exit status, not a stack trace."""
    try:
        yield
    except SurgeonError as error:
        Console(stderr=True).print(
            f"[bold red]error:[/] {_escape(error.cause)}\n{_escape(error.remedy)}", soft_wrap=True
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; nothing was written")
        raise typer.Exit(130) from None


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
