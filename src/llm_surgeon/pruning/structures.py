"""The socket for structures: the costs of what can be removed, the selection, and the matrices after the removal.

``Shapes`` shrinks the matrices. ``Elements`` (single weights, N:M) leaves zeros in matrices of the same shape.
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
    """Structure that a run removes, with masks of what is left so far.

    Attributes:
        score_name: Name of the score that ranks the candidates, in words.
    """

    score_name: str

    @property
    def masks(self) -> Masks:
        """Masks of what is left, by layer."""

    @property
    def shapes(self) -> Mapping[str, KeepMask]:
        """Rows and columns that the matrices in the model still have."""

    @property
    def element_masks(self) -> Mapping[str, Tensor] | None:
        """Masks ``[R, C]`` bool of the kept weights, by layer, if zeros are stored; None if the matrices shrink."""

    def costs(self, layer: LinearLayer, weight: Tensor, fisher: Fisher) -> Any:
        """Costs of a layer's candidates, on the CPU."""

    def select(self, costs: Mapping[str, Any], target_weights: int) -> Any:
        """Choose the candidates that go, by one threshold over all layers."""

    def scored(self, costs: Mapping[str, Any], selection: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores of all candidates and whether each goes, tensor by tensor; for the record."""

    def matrix_after(self, layer: LinearLayer, weight: Tensor, fisher: Callable[[], Fisher], selection: Any) -> Tensor:
        """The layer's matrix after the removal, the bias as last column; ``fisher`` is called only if it is needed."""

    def shapes_after(self, selection: Any) -> Mapping[str, KeepMask]:
        """Rows and columns that the matrices have after the removal."""

    def commit(self, selection: Any) -> None:
        """Set the masks to a selection's, after its removals are done."""

    def resume(self, masks: Any) -> None:
        """Set the masks to the ones that an earlier run has left."""


def check_structure(config: PruneConfig, anatomy: Anatomy) -> None:
    """Check that the layers of a model allow the structure of a recipe.

    Raises:
        ConfigError: If N:M does not divide a width, or the sparsity cannot be reached.
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
        ConfigError: If the layers of the model do not allow the structure.
    """
    check_structure(config, anatomy)
    return Shapes(config, anatomy) if config.parts else Elements(config, anatomy)
