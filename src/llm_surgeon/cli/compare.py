"""The command ``compare``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from llm_surgeon.cli.options import COMMON, option
from llm_surgeon.cli.shared import command_line, console, errors_as_messages
from llm_surgeon.comparison.variants import SUFFIXES, parse_methods, settings_of
from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.config import PruneConfig, read_recipe
from llm_surgeon.recipe.file import with_underscores
from llm_surgeon.recipe.grouping import flat
from llm_surgeon.recipe.methods import method_names
from llm_surgeon.recipe.quantity import shown
from llm_surgeon.system.logs import STARTING, log_to_stderr
from llm_surgeon.system.torchrun import require_one_process

logger = logging.getLogger(__name__)

_REPEAT = "Repeat for more."
# A structure that all methods can remove.
_STRUCTURE = "unstructured"
# Short help.
BRIEF = {
    "model": "A Hugging Face directory, a hub id, or the word demo.",
    "out": "Directory of the comparison: new, or one to go on with.",
    "methods": f"Separated by commas: {', '.join(method_names())}; with suffixes, e.g. +one-shot (see --help-all).",
    "recipe": "YAML file of common options, and of more variants under variants:.",
    "sparsity": "Share of the prunable weights to remove (default: 0.5). Repeat for more.",
    "structure": f"What is removed as a unit (default: {_STRUCTURE}). Repeat for more.",
    "shots": "Shots of the global methods (default: 5).",
    **{name: COMMON[name] for name in ("calibration", "samples", "seq_len")},
    "evaluation": "Text to measure on (default: held out of the calibration source).",
    "seed": "Seed of every random choice (default: 0).",
    **{name: COMMON[name] for name in ("device", "dtype")},
}


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
    sparsity: Annotated[list[float] | None, option("sparsity", _REPEAT)] = None,
    structure: Annotated[list[str] | None, option("structure", _REPEAT, _STRUCTURE)] = None,
    shots: Annotated[int | None, option("shots", default=PruneConfig.model_fields["shots"].default)] = None,
    calibration: Annotated[list[str] | None, option("calibration")] = None,
    samples: Annotated[int | None, option("samples")] = None,
    seq_len: Annotated[int | None, option("seq_len")] = None,
    windows_per_sample: Annotated[int | None, option("windows_per_sample")] = None,
    bos: Annotated[str | None, option("bos")] = None,
    batch_size: Annotated[int | None, option("batch_size")] = None,
    seed: Annotated[int | None, option("seed")] = None,
    device: Annotated[str | None, option("device")] = None,
    dtype: Annotated[str | None, option("dtype")] = None,
    precision: Annotated[str | None, option("precision")] = None,
    trust_remote_code: Annotated[bool | None, option("trust_remote_code")] = None,
    evaluation: Annotated[list[str] | None, option("evaluation")] = None,
    eval_window: Annotated[int | None, option("eval_window")] = None,
    eval_tokens: Annotated[int | None, option("eval_tokens")] = None,
) -> None:
    """Run methods on identical tokens and write one table: perplexity, divergence, sparsity, seconds, peak memory.

    Each method under each setting is a process of its own. Run the same command again to go on after an interruption:
    what is finished is kept, what failed is tried again.
    """
    given = {name: value for name, value in locals().items() if name not in ("model", "out", "recipe", "methods")}
    with errors_as_messages("interrupted; what is finished is kept, the same command goes on"):
        require_one_process("compare")
        common: dict[str, Any] = read_recipe(recipe) if recipe else {}
        common |= {name: value for name, value in given.items() if value not in (None, [])}
        variants = _variants(methods, common.pop("variants", None))
        settings = settings_of(
            _listed(common, "structure", _STRUCTURE),
            _listed(common, "sparsity", PruneConfig.model_fields["sparsity"].default),
        )
        log_to_stderr()
        logger.info(STARTING)
        from llm_surgeon.comparison.compare import compare as run
        from llm_surgeon.report.comparison_table import comparison_tables

        result = run(model, out, variants, settings, common, show_progress=True, command=command_line())
        output = console()
        output.print(comparison_tables(result))
        output.print(
            f"Table: {out / 'comparison.md'}, picture: {out / 'comparison.png'}, numbers: {out / 'comparison.json'}",
            soft_wrap=True,
        )
        if any(cell.status == "failed" for cell in result.cells):
            raise typer.Exit(1)


def _variants(methods: str | None, more: Any) -> dict[str, dict[str, Any]]:
    """Variants that ``--methods`` names, and the recipe's own variants."""
    named = parse_methods(methods or "")
    if more is None:
        return named
    if not isinstance(more, dict) or not all(isinstance(options, dict) for options in more.values()):
        raise ConfigError(
            "The recipe's variants are not a mapping of names to options.", "Write name: {option: value}."
        )
    variants = {str(name): flat(with_underscores(options)) for name, options in more.items()}
    both = next((name for name in variants if name in named), None)
    if both is not None:
        raise ConfigError(
            f"{shown(both)} is a variant of the recipe and one of --methods.", "Give the variant another name."
        )
    return named | variants


def _listed(options: dict[str, Any], name: str, default: Any) -> list[Any]:
    """Take an option with several values out of the options, and check each value."""
    value = options.pop(name, None)
    if value is None:
        value = default
    values = value if isinstance(value, list) else [value]
    if None in values:
        raise ConfigError(f"One of the values of {name} is nothing.", "Leave it out.")
    for each in values:
        PruneConfig.from_mapping({name: each})
    return values
