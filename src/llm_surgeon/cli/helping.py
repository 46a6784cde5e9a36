"""Help of the commands: shown as it is written, and in two lengths for commands with many options."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup, TyperOption

from llm_surgeon.recipe.removed import REMOVED

_HELP_ALL = {"help_all": "Show every option, in groups, and exit."}


def literal(text: str) -> str:
    """Escape text for rich's markup, so that no bracket becomes a style, and no ``:M:`` an emoji."""
    # Markup has no escape for emoji, but finds them between its tags only.
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


class BriefCommand(LiteralCommand):
    """A command of many options: ``--help`` shows the most used ones, ``--help-all`` shows all of them, in panels.

    Attributes:
        brief: Short help of each parameter that ``--help`` shows, in the order of the help.
    """

    # Each command has a class of its own, see ``briefly``.
    brief: Mapping[str, str] = {}

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the parameters that have a short help."""
        every = self.params
        by_name = {param.name: param for param in every}
        self.params = [_briefly(by_name[name], text) for name, text in {**self.brief, **_HELP_ALL}.items()]
        try:
            super().format_help(ctx, formatter)
        finally:
            self.params = every

    def show_all(self, ctx: Any) -> None:
        """Show every parameter, each with its whole help."""
        super().format_help(ctx, ctx.make_formatter())

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, and refuse an option of former versions with the behaviour that replaced it."""
        for argument in args:
            name = argument.split("=")[0].removeprefix("--").replace("-", "_")
            if argument.startswith("--") and name in REMOVED:
                raise typer.BadParameter(f"The option {argument.split('=')[0]} was removed: {REMOVED[name]}.", ctx)
        return super().parse_args(ctx, args)


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if wanted and isinstance(ctx.command, BriefCommand):
        ctx.command.show_all(ctx)
        raise typer.Exit


def with_help_all(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which is to be a ``BriefCommand``, the option ``--help-all``."""
    signature = inspect.signature(command, eval_str=True)
    option = typer.Option(
        "--help-all", is_eager=True, expose_value=False, callback=_show_all, help=_HELP_ALL["help_all"]
    )
    added = inspect.Parameter(
        "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
    )

    @wraps(command)
    def without_it(*args: Any, help_all: bool = False, **kwargs: Any) -> None:
        command(*args, **kwargs)

    # Typer reads this attribute as the function's signature.
    without_it.__signature__ = signature.replace(parameters=[*signature.parameters.values(), added])  # type: ignore[attr-defined]
    return without_it


def briefly(texts: Mapping[str, str]) -> type[BriefCommand]:
    """Make the class of a command with a short help.

    Args:
        texts: Short help of each parameter that is shown, in the order of the help.
    """
    return type("Command", (BriefCommand,), {"brief": texts})


def _briefly(param: Any, text: str) -> Any:
    """Copy of a parameter for the short help, in one panel with the others."""
    shown = copy.copy(param)
    shown.help, shown.rich_help_panel = literal(text), None
    if isinstance(shown, TyperOption):
        # The text of the short help has the default, so that it needs no line of its own.
        shown.show_default = False
    return shown
