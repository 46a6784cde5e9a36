"""The kinds of structure that can be removed: what each costs, selects and leaves behind.

``Shapes`` shrinks the matrices; ``Elements`` (single weights, N:M) leaves zeros in matrices of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor

from llm_surgeon.mathematics.fisher import Fisher
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.mathematics.unstructured_selection import ElementMask
from llm_surgeon.models.anatomy import Anatomy, LinearLayer
from llm_surgeon.pruning.elements import Elements, check_pattern
from llm_surgeon.pruning.shapes import Shapes, check_shapes
from llm_surgeon.recipe.config import PruneConfig

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

    def resume(self, masks: Any) -> None:
        """Begin with what an earlier run has left."""


def check_structure(config: PruneConfig, anatomy: Anatomy) -> None:
    """Find out whether the layers of a model allow the structure of a recipe.

    Raises:
        ConfigError: If N:M does not divide a width, or what is asked for cannot be reached; names the remedy.
    """
    check_pattern(config, anatomy)
    if config.parts:
        check_shapes(config, anatomy)


def structure_of(config: PruneConfig, anatomy: Anatomy) -> Structure:
    """The structure that a recipe names, with everything kept.

    Args:
        config: The recipe.
        anatomy: The layers of the model.

    Raises:
        ConfigError: If the layers of the model do not allow it.
    """
    check_structure(config, anatomy)
    return Shapes(config, anatomy) if config.parts else Elements(config, anatomy)
