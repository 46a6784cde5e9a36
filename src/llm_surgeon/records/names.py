"""Names of paths for headings and for what is published."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path


def distinct_names(paths: Sequence[str], taken: Iterable[str] = ()) -> list[str]:
    """Last parts of paths, with as many parts in front of them as tell them apart; what is equal all along is numbered.

    Args:
        paths: The paths, or other names.
        taken: Names that have a meaning of their own.
    """
    known = _apart([*dict.fromkeys(paths)], {*taken})
    numbers = [paths[:place].count(path) for place, path in enumerate(paths)]
    return [
        f"{known[path]} ({number + 1})" if number else known[path] for path, number in zip(paths, numbers, strict=True)
    ]


def _apart(paths: Sequence[str], taken: set[str]) -> dict[str, str]:
    """Last parts of different paths, as few as tell them apart."""
    parts = [[part for part in Path(path).parts if part != Path(path).anchor] or [path] for path in paths]
    for length in range(1, 1 + max(map(len, parts), default=0)):
        names = ["/".join(own[-length:]) for own in parts]
        if len({*names}) == len(names) and not {*names} & taken:
            return dict(zip(paths, names, strict=True))
    return {path: f"{own[-1]} ({number})" for number, (path, own) in enumerate(zip(paths, parts, strict=True), start=1)}
