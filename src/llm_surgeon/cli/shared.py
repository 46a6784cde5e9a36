"""What the commands share: options made from the recipe, literal help, consoles, and errors as messages."""

from __future__ import annotations

import inspect
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType, NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from llm_surgeon.errors import OutputError, SurgeonError
from llm_surgeon.recipe.config import PruneConfig, read_recipe
from llm_surgeon.recipe.presets import OPTIONS as PRESET_OPTIONS
from llm_surgeon.records import Record
from llm_surgeon.system.logs import error_console, print_error
from llm_surgeon.system.torchrun import own_place

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
        *("calibration", "samples", "seq_len", "windows_per_sample", "bos"),
        *("evaluation", "eval_window", "eval_stride", "eval_tokens"),
    ),
}

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that a checkpoint brings, if it is no export of ours.")
]


def literal(text: str) -> str:
    """Text as rich's markup that shows it as it is written: no bracket is a style, and no ``:M:`` an emoji."""
    # Markup has no escape for emoji, but looks for them between its tags only.
    return "[none][/]".join(escape(part) for part in re.split("(?<=:)", text))


class LiteralCommand(TyperCommand):
    """A command whose help is shown as it is written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _make_literal(self)


class LiteralGroup(TyperGroup):
    """A group of commands whose help is shown as it is written."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _make_literal(self)


def _make_literal(command: Any) -> None:
    for described in (command, *command.params):
        if described.help:
            described.help = literal(described.help)


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
    # The bytes of an argument that the locale has no characters for are most likely UTF-8, as the record is.
    return os.fsencode(shlex.join(["llm-surgeon", *sys.argv[1:]])).decode("utf8", "replace")


def console() -> Console:
    """Where results go: standard output. Text is shown as it is: names and paths may hold brackets and colons."""
    # A log file has no width of its own; the tables need 100 columns.
    return Console(markup=False, emoji=False, width=None if sys.stdout.isatty() else 100)


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
def faults_reported() -> Iterator[None]:
    """Ask for a report of an error that is none of the user's, below its stack trace."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        versions = ", ".join(f"{package} {version(package)}" for package in ("llm-surgeon", "torch", "transformers"))
        print_error(
            "This was not foreseen, and is probably a fault of llm-surgeon.",
            f"Please report it, with all of the above, the command and the versions: {versions}, "
            f"Python {sys.version.split()[0]}.",
        )
        sys.exit(1)


class Terminated(KeyboardInterrupt):
    """A request to end (SIGTERM), which is answered as Ctrl-C is."""


def interrupt_on_sigterm() -> None:
    """Let SIGTERM clear up, and say how to go on, as Ctrl-C does; several processes have their own way."""

    def end(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    # Whoever ignores it (trap '' TERM) wants the process to go on.
    if own_place().count == 1 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)


@contextmanager
def errors_as_messages(
    interrupted: str | Callable[[], str] = "interrupted; nothing was written",
) -> Iterator[None]:
    """A user's mistake is two sentences and an exit status, not a stack trace.

    Args:
        interrupted: What to say after an interrupt, or gives it.
    """
    try:
        yield
    except SurgeonError as error:
        _say_once(error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt as interrupt:
        if own_place().rank == 0:
            error_console().print(interrupted if isinstance(interrupted, str) else interrupted(), soft_wrap=True)
        number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
        raise typer.Exit(128 + number) from None


def _say_once(error: SurgeonError) -> None:
    """Print an error; one process does, if several find the same."""
    if own_place().count == 1:
        print_error(error.cause, error.remedy)
        return
    # torchrun ends all processes when one has ended; this one ends by itself, once it has said why.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # Imported late, see prune.
    from llm_surgeon.system.processes import say_once

    say_once(str(error), lambda: print_error(error.cause, error.remedy))
