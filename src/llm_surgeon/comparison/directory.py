"""The directory of a comparison: its files, a check that it belongs to the comparison, and its finished cells."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llm_surgeon.comparison.variants import PlannedCell
from llm_surgeon.errors import ComparisonError, OutputError
from llm_surgeon.recipe.config import PruneConfig, differences
from llm_surgeon.records import Cell, Comparison, Record
from llm_surgeon.system.files import check_output, in_place

_OTHER = "Give another --out for this comparison."
_Kind = TypeVar("_Kind", bound=Record)


class ComparisonDirectory:
    """The files of one comparison.

    Args:
        path: The directory, which need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "comparison.json"
        self.table = path / "comparison.md"
        self.picture = path / "comparison.png"
        self.reference = path / "dense.safetensors"
        self._cells = path / "cells"

    def former(self, model: str, shared: Mapping[str, Any]) -> Comparison | None:
        """The comparison so far, or None if the directory is new or empty.

        Args:
            model: The model of the present comparison.
            shared: Options that all cells of the present comparison share.

        Raises:
            OutputError: If the directory cannot be written, or holds other files.
            ComparisonError: If the directory holds a comparison of another model, or with other texts.
        """
        if not self.record.is_file():
            check_output(self.path)
            return None
        former = _read(self.record, Comparison)
        _check_same(f"The comparison in {self.path}", former.model, former.shared, model, shared)
        return former

    def finished(self, model: str, cells: Sequence[PlannedCell]) -> dict[str, Cell]:
        """Finished cells among those planned, by name, which need not be run again.

        Raises:
            OutputError: If a cell's file cannot be read.
            ComparisonError: If a cell of the same name is finished with another recipe.
        """
        found = {}
        for cell in cells:
            path = self._cells / f"{cell.name}.json"
            if cell.config is None or not path.is_file():
                continue
            former = _read(path, Cell)
            if former.status == "finished":
                what = f"The cell {cell.name} in {self.path}"
                _check_same(what, former.model, former.recipe or {}, model, cell.config.resolved())
                found[cell.name] = former
        return found

    def finished_before(self, names: Container[str]) -> list[Cell]:
        """Finished cells of earlier calls with the same directory: all but those with one of the names."""
        paths = (path for path in sorted(self._cells.glob("*.json")) if path.stem not in names)
        return [cell for cell in (_read(path, Cell) for path in paths) if cell.status == "finished"]

    def write_cell(self, cell: Cell) -> None:
        """Write the record of a cell."""
        self._cells.mkdir(parents=True, exist_ok=True)
        _write(self._cells / f"{cell.name}.json", cell)

    def write_record(self, comparison: Comparison) -> None:
        """Write the comparison so far."""
        _write(self.record, comparison)

    def drop_reference(self) -> None:
        """Remove the dense model's hidden states, half-written ones too."""
        self.reference.unlink(missing_ok=True)
        self.reference.with_name(f"{self.reference.name}.partial").unlink(missing_ok=True)


def _check_same(what: str, old_model: str, old: Mapping[str, Any], new_model: str, new: Mapping[str, Any]) -> None:
    # An option that did not exist when the file was written had its default value.
    defaults = PruneConfig.from_mapping({}).resolved()
    before = {"model": old_model} | {name: defaults[name] for name in new} | dict(old)
    now = {"model": new_model, **new}
    changed = differences(before, now)
    if changed:
        raise ComparisonError(f"{what} was made with other options: {'; '.join(changed)}.", _OTHER)


def _read(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        return kind.model_validate_json(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:  # a ValidationError is a ValueError
        reason = str(error).splitlines()[0]
        raise OutputError(f"{path} cannot be read as part of a comparison: {reason}.", _OTHER) from None


def _write(path: Path, record: Record) -> None:
    with in_place(path) as beside:
        beside.write_text(record.model_dump_json(indent=2) + "\n", encoding="utf8")
