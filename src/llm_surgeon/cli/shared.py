"""What the commands share: options made from the recipe, consoles, and errors as messages."""

from __future__ import annotations

import inspect
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console

from llm_surgeon.config import PruneConfig, read_recipe
from llm_surgeon.errors import OutputError, SurgeonError
from llm_surgeon.presets import OPTIONS as PRESET_OPTIONS
from llm_surgeon.records import Record
from llm_surgeon.torchrun import place

_PANELS = {
    "What to remove": (
        *("sparsity", "target_params", "target_bytes", "target_latency"),
        *("structure", "uniform", "round_to", "min_width"),
        *("preset", "method", "shots", "steps_per_shot", "rank_by", "ignore", "export_shots"),
    ),
    "Curvature and update": (
        *("curvature", "fisher", "fisher_samples", "gradient_share", "kronecker_iterations"),
        *("dampening_a", "dampening_g", "max_correlations", "update_steps"),
    ),
    "Layer-wise methods": (
        *("scope", "layer_budget", "owl_multiple", "owl_spread", "permute"),
        *("score_alpha", "score_norm", "score_ratio", "score_activation", "sparsegpt_block"),
        *("refine", "refine_cycles", "refine_threshold", "refine_reweight"),
    ),
    "Reconstruction": (
        *(name for name in PruneConfig.model_fields if name.startswith("reconstruction")),
        "cross_fit",
    ),
    "Gates": ("gate_steps", "gate_width", "gate_damping"),
    "First-order corrections": tuple(name for name in PruneConfig.model_fields if name.startswith("lora")),
    "Texts": (
        *("calibration", "samples", "seq_len", "windows_per_sample"),
        *("evaluation", "eval_window", "eval_stride", "eval_tokens"),
    ),
}

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that a checkpoint brings, if it is no export of ours.")
]


def option(name: str, more: str = "", default: Any = None) -> Any:
    """The command-line option of a recipe's key, with its help, and more of it, and the default that the recipe gives.

    Args:
        name: The key.
        more: To be added to the help.
        default: Default of the command, if it is not that of the recipe.
    """
    field = PruneConfig.model_fields[name]
    if default is None:
        own = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        default = f"the preset's; {own} without one" if name in PRESET_OPTIONS else own
    text = f"{field.description}" + (f" (default: {default})" if default not in (None, "") else "")
    panel = next((panel for panel, names in _PANELS.items() if name in names), "Machine")
    return typer.Option(help=f"{text} {more}".rstrip(), rich_help_panel=panel)


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--recipe`` and an option for each of the recipe's keys, in place of its ``**given``.

    What it is then called with is for ``config_of``.
    """
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    recipe = typer.Option(help="YAML file of these options; the command line overrides.")
    options = {"recipe": Annotated[Path | None, recipe]} | {
        name: Annotated[_typed(field.annotation) | None, option(name)]
        for name, field in PruneConfig.model_fields.items()
    }
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]
    # Typer asks the function for its signature, and this attribute is what it is told.
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return command


def _typed(annotation: Any) -> Any:
    """The type of a key as the command line has it: the recipe checks choices itself, and lists them in its message."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    # What has a form of its own (90M) is read by the recipe as well.
    if origin in (Literal, Annotated):
        return str
    if origin is tuple:
        return list[arguments[0]]  # type: ignore[valid-type]
    if NoneType in arguments:
        return _typed(next(argument for argument in arguments if argument is not NoneType))
    return annotation


def config_of(given: Mapping[str, Any]) -> PruneConfig:
    """The recipe that the options of ``with_recipe`` make together.

    Raises:
        ConfigError: If the file cannot be read, a key is unknown or a value is out of range.
    """
    options: dict[str, Any] = read_recipe(given["recipe"]) if given["recipe"] else {}
    return PruneConfig.from_mapping(
        options | {name: value for name, value in given.items() if name != "recipe" and value is not None}
    )


def command_line() -> str:
    """The command as it was typed, for the record."""
    return shlex.join(["llm-surgeon", *sys.argv[1:]])


def console() -> Console:
    """Where results go: standard output."""
    # A log file has no width of its own; the tables need 100 columns.
    return Console() if sys.stdout.isatty() else Console(width=100)


def write_result(out: Path, result: Record) -> None:
    """Write a record as JSON.

    Raises:
        OutputError: If the file cannot be written.
    """
    try:
        out.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf8")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}.", "Give another --out.") from None


@contextmanager
def errors_as_messages(interrupted: str = "interrupted; nothing was written") -> Iterator[None]:
    """A user's mistake is two sentences and an exit status, not a stack trace."""
    try:
        yield
    except SurgeonError as error:
        _say_once(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if place().rank == 0:
            Console(stderr=True).print(interrupted)
        raise typer.Exit(130) from None


def _say_once(error: SurgeonError) -> None:
    """Print an error; one process does, if several find the same."""
    if place().count == 1:
        print_error(error.cause, error.remedy)
        return
    # torchrun ends all processes when one has ended; this one ends by itself, once it has said why.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Imported late, see prune.
    from llm_surgeon.processes import say_once

    say_once(str(error), lambda: print_error(error.cause, error.remedy))


def print_error(cause: str, remedy: str) -> None:
    """Say on standard error what went wrong and what to do about it."""
    Console(stderr=True).print(f"[bold red]error:[/] {_escape(cause)}\n{_escape(remedy)}", soft_wrap=True)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
