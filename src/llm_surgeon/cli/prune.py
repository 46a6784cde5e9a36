"""The command ``prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_surgeon.cli.shared import command_line, console, errors_as_messages, option
from llm_surgeon.config import PruneConfig, read_recipe
from llm_surgeon.report.log import log_to_stderr, quiet_transformers


def prune(
    model: Annotated[str, typer.Argument(help="A local Hugging Face directory, a hub id, or the word demo.")],
    out: Annotated[Path, typer.Option(help="Directory to make; must not exist, or be empty.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML file of these options; the command line overrides.")] = None,
    sparsity: Annotated[float | None, option("sparsity")] = None,
    target_params: Annotated[str | None, option("target_params")] = None,
    target_bytes: Annotated[str | None, option("target_bytes")] = None,
    target_latency: Annotated[float | None, option("target_latency")] = None,
    structure: Annotated[str | None, option("structure")] = None,
    method: Annotated[str | None, option("method")] = None,
    curvature: Annotated[str | None, option("curvature")] = None,
    fisher: Annotated[str | None, option("fisher")] = None,
    fisher_samples: Annotated[int | None, option("fisher_samples")] = None,
    kronecker_iterations: Annotated[int | None, option("kronecker_iterations")] = None,
    shots: Annotated[int | None, option("shots")] = None,
    uniform: Annotated[bool | None, option("uniform")] = None,
    round_to: Annotated[int | None, option("round_to")] = None,
    min_width: Annotated[float | None, option("min_width")] = None,
    rank_by: Annotated[str | None, option("rank_by")] = None,
    calibration: Annotated[str | None, option("calibration")] = None,
    samples: Annotated[int | None, option("samples")] = None,
    seq_len: Annotated[int | None, option("seq_len")] = None,
    batch_size: Annotated[int | None, option("batch_size")] = None,
    dampening_a: Annotated[float | None, option("dampening_a")] = None,
    dampening_g: Annotated[float | None, option("dampening_g")] = None,
    max_correlations: Annotated[int | None, option("max_correlations")] = None,
    update_steps: Annotated[int | None, option("update_steps")] = None,
    scope: Annotated[str | None, option("scope")] = None,
    layer_budget: Annotated[str | None, option("layer_budget")] = None,
    owl_multiple: Annotated[float | None, option("owl_multiple")] = None,
    owl_spread: Annotated[float | None, option("owl_spread")] = None,
    score_alpha: Annotated[float | None, option("score_alpha")] = None,
    score_norm: Annotated[float | None, option("score_norm")] = None,
    score_ratio: Annotated[float | None, option("score_ratio")] = None,
    score_activation: Annotated[bool | None, option("score_activation")] = None,
    sparsegpt_block: Annotated[int | None, option("sparsegpt_block")] = None,
    refine: Annotated[str | None, option("refine")] = None,
    refine_cycles: Annotated[int | None, option("refine_cycles")] = None,
    refine_threshold: Annotated[float | None, option("refine_threshold")] = None,
    refine_reweight: Annotated[str | None, option("refine_reweight")] = None,
    permute: Annotated[bool | None, option("permute")] = None,
    seed: Annotated[int | None, option("seed")] = None,
    device: Annotated[str | None, option("device")] = None,
    dtype: Annotated[str | None, option("dtype")] = None,
    precision: Annotated[str | None, option("precision")] = None,
    lora: Annotated[bool | None, option("lora")] = None,
    lora_rank: Annotated[int | None, option("lora_rank")] = None,
    lora_learning_rate: Annotated[float | None, option("lora_learning_rate")] = None,
    lora_steps: Annotated[int | None, option("lora_steps")] = None,
    lora_final_steps: Annotated[int | None, option("lora_final_steps")] = None,
    lora_share: Annotated[float | None, option("lora_share")] = None,
    export_shots: Annotated[list[int] | None, option("export_shots")] = None,
    evaluation: Annotated[str | None, option("evaluation")] = None,
    eval_window: Annotated[int | None, option("eval_window")] = None,
    eval_stride: Annotated[int | None, option("eval_stride")] = None,
    eval_tokens: Annotated[int | None, option("eval_tokens")] = None,
    ignore: Annotated[list[str] | None, option("ignore")] = None,
) -> None:
    """Prune MODEL's linear layers, correct what is left, export it and check the export."""
    given = {name: value for name, value in locals().items() if name not in ("model", "out", "recipe")}
    with errors_as_messages():
        options: dict[str, Any] = read_recipe(recipe) if recipe else {}
        options |= {name: value for name, value in given.items() if value is not None}
        config = PruneConfig.from_mapping(options)
        # Imported late: torch and transformers take seconds, and a wrong option should not wait for them.
        from llm_surgeon.pipeline.run import prune_checkpoint
        from llm_surgeon.report.progress import RichProgress
        from llm_surgeon.report.table import summary_table

        quiet_transformers()
        errors = log_to_stderr()
        report = prune_checkpoint(model, out, config, progress=RichProgress(errors), command=command_line())
        output = console()
        output.print(summary_table(report))
        output.print(
            f"The reloaded export agrees with the model in memory. Report: {out / 'report.html'} (numbers: "
            f"{out / 'report.json'}), model card: {out / 'README.md'}",
            soft_wrap=True,
        )
