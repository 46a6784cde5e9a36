"""Single weights, anywhere or N of every M consecutive inputs: zeros in matrices of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.fisher import Fisher
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.mathematics.unstructured_selection import (
    ElementMask,
    ElementSelection,
    candidate_scores,
    select_elements,
    whole_groups,
)
from llm_surgeon.models.anatomy import Anatomy, LinearLayer
from llm_surgeon.models.matrix import check_finite
from llm_surgeon.models.modes import products
from llm_surgeon.pruning.solver import solver_of
from llm_surgeon.recipe.config import PruneConfig


def check_pattern(config: PruneConfig, anatomy: Anatomy) -> None:
    """Check that the layers of a model allow the N:M of a recipe.

    Raises:
        ConfigError: If N:M does not divide a width, with the layer's name.
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


class Elements:
    """Single weights, anywhere or N of every M consecutive inputs; biases are never removed."""

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
        """Masks ``[R, C]`` of the kept weights, by layer."""
        return {name: mask.elements for name, mask in self.masks.items()}

    def costs(self, layer: LinearLayer, weight: Tensor, fisher: Fisher) -> Tensor:
        """Cost of each weight, ``[R, C]``."""
        costs = fisher.element_costs(weight, correlated=self._config.correlated)[:, : layer.columns].float()
        check_finite(layer, costs)
        return costs.cpu()

    def select(self, costs: Mapping[str, Tensor], target_weights: int) -> ElementSelection:
        """Choose the weights that go, by the largest threshold that leaves the target."""
        return select_elements(self.masks, costs, target_weights, self._pattern)

    def scored(self, costs: Mapping[str, Tensor], selection: ElementSelection) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores of the kept weights, or of groups that are whole, and whether each goes; for the record."""
        for name, keep in self.masks.items():
            scores = candidate_scores(keep, costs[name], self._pattern)
            after = selection.keep[name].elements
            yield scores, ~(after[keep.elements] if self._pattern is None else whole_groups(keep, after, self._pattern))

    def matrix_after(
        self, layer: LinearLayer, weight: Tensor, fisher: Callable[[], Fisher], selection: ElementSelection
    ) -> Tensor:
        """The layer's matrix after the removal, ``[R, C (+ bias)]``, zero where weights are removed."""
        before, kept = self.masks[layer.name].elements, selection.keep[layer.name].elements
        if torch.equal(before, kept):
            return weight
        kept = kept.to(weight.device)
        if layer.bias:
            kept = torch.cat([kept, kept.new_ones(len(kept), 1)], dim=1)
        if not self._config.correlated:
            return weight * kept
        with products(self._config.precision):
            return fisher().remove_elements(weight, kept, solver_of(self._config))

    def shapes_after(self, selection: ElementSelection) -> Mapping[str, KeepMask]:
        """Rows and columns of the matrices, which removals of single weights leave as they are."""
        return self.shapes

    def commit(self, selection: ElementSelection) -> None:
        """Set the masks to a selection's, after its removals are done."""
        self.masks = selection.keep

    def resume(self, masks: Mapping[str, ElementMask]) -> None:
        """Set the masks to the ones that an earlier run has left."""
        self.masks = masks
