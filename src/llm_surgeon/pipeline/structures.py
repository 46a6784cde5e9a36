"""The kinds of structure that can be removed: what each costs, selects and leaves behind.

``RowsColumns`` shrinks the matrices; ``Elements`` (single weights, N:M) leaves zeros in matrices of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_surgeon.config import PruneConfig
from llm_surgeon.element_selection import (
    ElementMask,
    ElementSelection,
    candidate_scores,
    select_elements,
    whole_groups,
)
from llm_surgeon.errors import ConfigError, NonFiniteError
from llm_surgeon.fisher import Fisher, Solver, Split
from llm_surgeon.models.family import Anatomy, LinearLayer, to_index
from llm_surgeon.models.modes import products
from llm_surgeon.selection import AXES, KeepMask, Selection, StructureCosts, select, single_scores

Masks = Mapping[str, KeepMask] | Mapping[str, ElementMask]


class Structure(Protocol):
    """What a run removes, and what is left so far.

    Attributes:
        score_name: What candidates are ranked by, in words.
    """

    score_name: str

    @property
    def masks(self) -> Masks:
        """What is left, per layer."""

    @property
    def shapes(self) -> Mapping[str, KeepMask]:
        """Rows and columns that the matrices in the model still have."""

    @property
    def element_masks(self) -> Mapping[str, Tensor] | None:
        """Kept weights per layer, ``[R, C]`` bool, if zeros are stored; None if the matrices shrink."""

    def costs(self, layer: LinearLayer, weight: Tensor, fisher: Fisher) -> Any:
        """Costs of what a layer could lose, on the CPU."""

    def select(self, costs: Mapping[str, Any], target_weights: int) -> Any:
        """Choose what goes by one threshold over all layers."""

    def scored(self, costs: Mapping[str, Any], selection: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores of all candidates, and which of them go, tensor by tensor: for the record."""

    def matrix_after(self, layer: LinearLayer, weight: Tensor, fisher: Callable[[], Fisher], selection: Any) -> Tensor:
        """A layer's matrix after the removal, with the bias as last column; makes the Fisher if it needs it."""

    def shapes_after(self, selection: Any) -> Mapping[str, KeepMask]:
        """Rows and columns that the matrices have once the selection is gone."""

    def commit(self, selection: Any) -> None:
        """Make the selection what is left."""


def check_structure(config: PruneConfig, anatomy: Anatomy) -> None:
    """Find out whether the layers of a model allow the structure of a recipe.

    Raises:
        ConfigError: If N:M does not divide a width; names the layer and the remedy.
    """
    pattern = config.pattern
    if pattern is None:
        return
    odd = [layer for layer in anatomy.layers.values() if layer.columns % pattern.group]
    if odd:
        raise ConfigError(
            f"{len(odd)} layers have a width that {config.structure} does not divide, among them {odd[0].name} with "
            f"{odd[0].columns} inputs.",
            f"Leave them dense with --ignore {odd[0].kind} (repeat for each kind), or choose another N:M.",
        )


def structure_of(config: PruneConfig, anatomy: Anatomy) -> Structure:
    """The structure that a recipe names, with everything kept.

    Args:
        config: The recipe.
        anatomy: The layers of the model.

    Raises:
        ConfigError: If the layers of the model do not allow it.
    """
    check_structure(config, anatomy)
    if config.structure == "rows-columns":
        return RowsColumns(config, anatomy)
    return Elements(config, anatomy)


class RowsColumns:
    """Whole rows and columns, matrix by matrix, with what their removal implies."""

    def __init__(self, config: PruneConfig, anatomy: Anatomy) -> None:
        self._config, self._anatomy = config, anatomy
        self._per_weight = config.rank_by == "cost-per-weight"
        self.masks: Mapping[str, KeepMask] = anatomy.dense_masks()
        self.score_name = "cost per weight freed" if self._per_weight else "cost"

    @property
    def shapes(self) -> Mapping[str, KeepMask]:
        """The masks themselves: what was removed is really gone."""
        return self.masks

    @property
    def element_masks(self) -> None:
        """None: what was removed is gone."""
        return None

    def costs(self, layer: LinearLayer, weight: Tensor, fisher: Fisher) -> StructureCosts:
        """Costs of the kept rows and columns, in the coordinates of the dense model."""
        keep, correlated = self.masks[layer.name], self._config.correlated
        rows = fisher.row_costs(weight, correlated=correlated)
        # The bias is a column of the matrix but never a structure of its own.
        columns = fisher.column_costs(weight, correlated=correlated)[: int(keep.columns.sum())]
        _check_finite(layer, rows, columns)
        return StructureCosts(_to_dense(rows, keep.rows), _to_dense(columns, keep.columns))

    def select(self, costs: Mapping[str, StructureCosts], target_weights: int) -> Selection:
        """The largest threshold that leaves the target; implied removals are counted."""
        return select(self.masks, costs, self._anatomy.couplings, target_weights, self._per_weight)

    def scored(self, costs: Mapping[str, StructureCosts], selection: Selection) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and columns one by one; whole groups are made of them."""
        for name, keep in self.masks.items():
            scores = single_scores(keep, costs[name], self._per_weight)
            for axis in AXES:
                alive = keep.axis(axis)
                yield scores.axis(axis)[alive], ~selection.keep[name].axis(axis)[alive]

    def matrix_after(
        self, layer: LinearLayer, weight: Tensor, fisher: Callable[[], Fisher], selection: Selection
    ) -> Tensor:
        """The kept rows and columns, ``[kept rows, kept columns (+ bias)]``."""
        before, after, chosen = self.masks[layer.name], selection.keep[layer.name], selection.chosen[layer.name]
        rows = _split(before.rows, after.rows, chosen.rows, weight.device)
        columns = _split(before.columns, after.columns, chosen.columns, weight.device)
        if layer.bias:
            last = columns.kept.new_tensor([weight.shape[1] - 1])
            columns = Split(torch.cat([columns.kept, last]), columns.removed)
        if not self._config.correlated or not len(rows.removed) + len(columns.removed):
            return weight[rows.kept][:, columns.kept]
        return fisher().remove_rows_and_columns(weight, rows, columns, _solver(self._config))

    def shapes_after(self, selection: Selection) -> Mapping[str, KeepMask]:
        """Smaller ones."""
        return selection.keep

    def commit(self, selection: Selection) -> None:
        """Make the selection what is left."""
        self.masks = selection.keep


class Elements:
    """Single weights, anywhere or N of every M consecutive inputs; the bias is never one of them."""

    score_name = "cost"

    def __init__(self, config: PruneConfig, anatomy: Anatomy) -> None:
        self._config, self._anatomy = config, anatomy
        self._pattern = config.pattern
        self.masks: Mapping[str, ElementMask] = {
            name: ElementMask(torch.ones(layer.rows, layer.columns, dtype=torch.bool))
            for name, layer in anatomy.layers.items()
        }
        self.shapes: Mapping[str, KeepMask] = anatomy.dense_masks()
        if self._pattern is not None:
            self.score_name = f"cost of a group of {self._pattern.group}"

    @property
    def element_masks(self) -> Mapping[str, Tensor]:
        """Kept weights per layer."""
        return {name: mask.elements for name, mask in self.masks.items()}

    def costs(self, layer: LinearLayer, weight: Tensor, fisher: Fisher) -> Tensor:
        """Cost of each weight, ``[R, C]``."""
        costs = fisher.element_costs(weight, correlated=self._config.correlated)[:, : layer.columns].float()
        _check_finite(layer, costs)
        return costs.cpu()

    def select(self, costs: Mapping[str, Tensor], target_weights: int) -> ElementSelection:
        """The largest threshold that leaves the target."""
        return select_elements(self.masks, costs, target_weights, self._pattern)

    def scored(self, costs: Mapping[str, Tensor], selection: ElementSelection) -> Iterator[tuple[Tensor, Tensor]]:
        """Kept weights, or groups that are whole."""
        for name, keep in self.masks.items():
            scores = candidate_scores(keep, costs[name], self._pattern)
            after = selection.keep[name].elements
            yield scores, ~(after[keep.elements] if self._pattern is None else whole_groups(keep, after, self._pattern))

    def matrix_after(
        self, layer: LinearLayer, weight: Tensor, fisher: Callable[[], Fisher], selection: ElementSelection
    ) -> Tensor:
        """The whole matrix, zero where nothing is kept."""
        before, kept = self.masks[layer.name].elements, selection.keep[layer.name].elements
        if torch.equal(before, kept):
            return weight
        kept = kept.to(weight.device)
        if layer.bias:
            kept = torch.cat([kept, kept.new_ones(len(kept), 1)], dim=1)
        if not self._config.correlated:
            return weight * kept
        with products(self._config.precision):
            return fisher().remove_elements(weight, kept, _solver(self._config))

    def shapes_after(self, selection: ElementSelection) -> Mapping[str, KeepMask]:
        """The same as before."""
        return self.shapes

    def commit(self, selection: ElementSelection) -> None:
        """Make the selection what is left."""
        self.masks = selection.keep


def _solver(config: PruneConfig) -> Solver:
    return Solver(config.max_correlations, config.update_steps)


def _check_finite(layer: LinearLayer, *costs: Tensor) -> None:
    if not all(bool(cost.isfinite().all()) for cost in costs):
        raise NonFiniteError(
            f"The pruning costs of {layer.name} are not finite.",
            "Run with --precision float32 and --dtype float32, or use more calibration samples.",
        )


def _to_dense(values: Tensor, mask: Tensor) -> Tensor:
    dense = torch.zeros(mask.shape, dtype=torch.float64)
    dense[mask] = values.double().cpu()
    return dense


def _split(before: Tensor, after: Tensor, chosen: Tensor, device: torch.device) -> Split:
    """Kept and chosen positions within what was left before the shot."""
    return Split(to_index(after[before]).to(device), to_index(chosen[before]).to(device))
