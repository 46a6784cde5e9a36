"""Command-line options made from the recipe's options, and the recipe made from the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.config import PruneConfig, read_recipe
from llm_surgeon.recipe.groups import GROUP_OF
from llm_surgeon.recipe.presets import OPTIONS as PRESET_OPTIONS
from llm_surgeon.recipe.switches import why_idle
from llm_surgeon.recipe.wording import flag, spelling

# Short help of the options that most people use, for plan and prune.
COMMON = {
    "sparsity": "Share of the prunable weights to remove (default: 0.5).",
    "target_params": "Instead of --sparsity: parameters to keep, e.g. 90M.",
    "target_bytes": "Instead: bytes of the weight files, e.g. 300MiB.",
    "target_latency": "Instead: milliseconds of a pass over 512 tokens.",
    "structure": "Smaller: rows-columns (default), neurons, heads, values, blocks, experts, or several joined by +. "
    "Zeros: unstructured, or N:M.",
    "preset": "best (default), fast (half the time) or none.",
    "method": "surgeon (default), or another of --help-all.",
    "calibration": "Hub data set id, a .txt/.jsonl/.parquet file, or demo[:en|fr|es]; several as TEXT:SHARE each "
    "(default: demo).",
    "samples": "Calibration sequences (default: 128).",
    "seq_len": "Tokens of each sequence (default: 512).",
    "recipe": "YAML file of options; the command line overrides.",
    "device": "auto (default), cpu, cuda or cuda:N.",
    "dtype": "auto (as stored), float32, bfloat16 or float16.",
    "device_memory": "GPU memory to use at most, e.g. 24GiB.",
    "host_memory": "Main memory to use at most, e.g. 16GiB.",
}


def option(name: str, more: str = "", default: Any = None) -> Any:
    """Make the command-line option of a recipe's key, with its help and its default.

    Args:
        name: Name of the key.
        more: Text to add to the help.
        default: Default of the command; None takes the recipe's default.
    """
    field = PruneConfig.model_fields[name]
    if default is None:
        own = _default_of(field)
        default = f"the preset's; {own} without one" if name in PRESET_OPTIONS else own
    return _option(name, field, default, more, GROUP_OF[name].title)


def _default_of(field: FieldInfo) -> Any:
    return ", ".join(field.default) if isinstance(field.default, tuple) else field.default


def _option(name: str, field: FieldInfo, default: Any, more: str = "", panel: str | None = None) -> Any:
    text = f"{field.description}" + (f" (default: {default})" if default not in (None, "") else "")
    # Typer makes both words of a truth value from the name.
    words = () if field.annotation is bool else (flag(name),)
    parser = _PARSERS.get(_kind(field.annotation))
    return typer.Option(*words, help=f"{text} {more}".rstrip(), rich_help_panel=panel, parser=parser)


def with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command ``--recipe`` and an option for each of the recipe's keys, in place of its ``**given``.

    The command hands ``given`` to ``config_of``.
    """
    recipe = typer.Option(help="YAML file of these options; the command line overrides.")
    return _with_options(
        command,
        {"recipe": Annotated[Path | None, recipe]}
        | {
            name: Annotated[_typed(field.annotation) | None, option(name)]
            for name, field in PruneConfig.model_fields.items()
        },
    )


def with_options(command: Callable[..., None], fields: Mapping[str, FieldInfo]) -> Callable[..., None]:
    """Give a command an option for each key of another recipe, in place of its ``**given``."""
    return _with_options(
        command,
        {
            name: Annotated[_typed(field.annotation) | None, _option(name, field, _default_of(field))]
            for name, field in fields.items()
        },
    )


def _with_options(command: Callable[..., None], options: Mapping[str, Any]) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in options.items()
    ]
    # Typer reads this attribute as the function's signature.
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    return command


def integer(text: str) -> Any:
    """Parse a whole number; other text stays as it is, so that the recipe refuses it in its own words."""
    try:
        return int(text)
    except ValueError:
        return text


def number(text: str) -> Any:
    """Parse a number; other text stays as it is, so that the recipe refuses it in its own words."""
    try:
        return float(text)
    except ValueError:
        return text


_PARSERS: dict[Any, Callable[[str], Any]] = {int: integer, float: number}


def _kind(annotation: Any) -> Any:
    """Type of a key's value, or of each value of a list, without None."""
    arguments = get_args(annotation)
    if get_origin(annotation) is tuple:
        return arguments[0]
    if NoneType in arguments:
        return _kind(next(argument for argument in arguments if argument is not NoneType))
    return annotation


def _typed(annotation: Any) -> Any:
    """Type of a key on the command line; choices are text, as the recipe checks them and lists them in its message."""
    kind = _kind(annotation)
    # Values with a form of their own (90M) are text too, as the recipe parses them.
    if get_origin(kind) in (Literal, Annotated):
        kind = str
    listed = any(get_origin(one) is tuple for one in (annotation, *get_args(annotation)))
    return list[kind] if listed else kind  # type: ignore[valid-type]


def config_of(given: Mapping[str, Any]) -> PruneConfig:
    """Make the recipe from the options of ``with_recipe``.

    Raises:
        ConfigError: If the file cannot be read, a key is unknown or a value is out of range, or an option of the
            command line has no effect.
    """
    options: dict[str, Any] = read_recipe(given["recipe"]) if given["recipe"] else {}
    typed = {name: value for name, value in given.items() if name != "recipe" and value not in (None, [])}
    config = PruneConfig.from_mapping(options | typed)
    # A recipe's file may have every option with its default, but a typed option is meant to have an effect.
    idle = next((name for name in typed if name in config.without_effect), None)
    if idle is not None:
        raise ConfigError(
            f"The recipe is not valid: {why_idle(idle, vars(config))}.",
            f"On the command line: {spelling(idle, PruneConfig.model_fields)}.",
        )
    return config
