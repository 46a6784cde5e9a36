"""The socket for stages after a shot: each fits the weights that the shot has left.

A stage is a class with a name. A run makes one instance of each class that its recipe wants, and keeps it for all of
its shots. Plan, progress, record, report page and checkpoint loop over stages and know none by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.skeleton import Skeleton
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.records import Figure
from llm_surgeon.session.session import Session

Advance = Callable[[int], None]
Parts = dict[str, int]
Order = Literal["batch-major", "layer-major"]


@dataclass(frozen=True)
class Shot:
    """A shot whose removals are done.

    Attributes:
        number: Number of the shot, from 1.
        keep: Rows and columns that are left of each layer; agrees with the model.
        elements: Kept weights of each layer, ``[rows, columns]`` bool, if zeros are stored; None if matrices shrink.
    """

    number: int
    keep: Mapping[str, KeepMask]
    elements: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Fitted:
    """The figures of one fit, and what they mean in a sentence or two."""

    figures: tuple[Figure, ...] = ()
    note: str = ""


class LiveBytes(Protocol):
    """Bytes of the tensors that a traced pass makes: those that live now, and the most that lived at once."""

    now: int
    peak: int


Measure = Callable[[LiveBytes], int]


class Tracer(Protocol):
    """Runs code of a stage on a model whose tensors have shapes and types but no numbers.

    Attributes:
        anatomy: The prunable layers at full depth.
    """

    anatomy: Anatomy

    def fake(self, tensor: Tensor) -> Tensor:
        """A tensor without numbers of the same shape and type, which code under the tracer may take."""

    def by_depth(self, prepare: Callable[[Session], Measure], sequences: int | None = None) -> int:
        """Bytes of a pass on the whole model; those of a deep one follow from two shallow ones.

        Args:
            prepare: Makes the measure of one batch in a session without numbers, whose tokens are that batch, and
                whose dense model is the model itself. It is called where tensors have numbers; its result runs the
                batch, and says the bytes beside the weights.
            sequences: Sequences of the batch; None takes those of a pass of the recipe.
        """


class TracedBytes(Protocol):
    """Bytes that passes of a run take beside the weights, as far as stages ask for them.

    Attributes:
        waiting: Hidden states of one batch in front of a block.
        watching: A batch in a block that is watched, beside those.
        stages: The result of ``Stage.trace`` of each stage.
    """

    @property
    def waiting(self) -> int: ...  # noqa: D102 - see the class

    @property
    def watching(self) -> int: ...  # noqa: D102 - see the class

    @property
    def stages(self) -> Mapping[str, int]: ...  # noqa: D102 - see the class


class Stage(ABC):
    """One stage of a run, made once for all of its shots.

    A new one needs a name, ``work`` and ``fit``, and its row in ``stages.STAGES`` (``stages.register_stage`` adds it);
    the rest has defaults.

    Attributes:
        name: Name of its phase in plan, progress, record and report.
        half: The text that the stage takes under cross-fitting: ``own`` half, the ``other`` one, or ``whole`` for a
            stage that runs once after both halves.
        needs_dense: Whether the stage needs the dense model beside the pruned one (``session.dense``).
        sweeps: Whether the stage takes all text through the model block by block.
        decomposes: Whether the stage decomposes matrices of the size of a layer's sides.
        stores: Whether the stage's passes take gradients and wait in the session's store if it has one.
        streams: Whether the stage can work with streamed weights.
    """

    name: ClassVar[str]
    half: ClassVar[Literal["own", "other", "whole"]] = "whole"
    needs_dense: ClassVar[bool] = False
    sweeps: ClassVar[bool] = False
    decomposes: ClassVar[bool] = False
    stores: ClassVar[bool] = False
    streams: ClassVar[bool] = True

    def __init__(self, session: Session) -> None:
        """Take the session of the run."""
        self.session = session

    @classmethod
    def wanted(cls, config: PruneConfig) -> bool:
        """Whether options of a recipe switch the stage on; one without options runs where ``stages`` names it."""
        return False

    @classmethod
    def check(cls, config: PruneConfig) -> None:
        """Find out early whether the stage is possible here.

        Raises:
            ConfigError: If something is missing, such as an optional package.
        """
        return

    @classmethod
    def resolved(cls, config: PruneConfig, anatomy: Anatomy) -> PruneConfig:
        """The recipe with options of the stage that depend on the whole text, before processes share that."""
        return config

    @classmethod
    def check_model(cls, session: Session) -> None:
        """Find out on the dense model whether the stage is possible for it, and warn of what will not help.

        Raises:
            SurgeonError: If the stage is not possible.
        """
        return

    @classmethod
    def changes(cls, model: nn.Module, anatomy: Anatomy) -> list[str]:
        """Names of parameters beside the prunable layers that the stage changes, for the checkpoints."""
        return []

    def begin(self) -> None:
        """Make what fits have in common, once, before progress of the first one is shown."""
        return

    @abstractmethod
    def work(self, shot: Shot, half: int | None) -> int:
        """Tokens that ``fit`` reports as its progress, all together."""

    @abstractmethod
    def fit(self, shot: Shot, half: int | None, advance: Advance) -> Fitted:
        """Fit what is left, in place.

        Args:
            shot: The shot whose removals are done.
            half: Which half of the calibration sequences to take, 0 or 1; None takes all.
            advance: Takes the number of tokens that went through.

        Returns:
            Figures for the record.
        """

    @classmethod
    def trace(cls, tracer: Tracer, config: PruneConfig) -> int:
        """Bytes that one batch of the stage's largest pass takes beside the weights; 0 without a pass of its own."""
        return 0

    @classmethod
    def memory(cls, skeleton: Skeleton, config: PruneConfig, traced: TracedBytes) -> Parts:
        """Bytes that the stage takes at its peak where the model runs, beside weights and store, by what holds them."""
        return {"passes": traced.stages.get(cls.name, 0)}

    @classmethod
    def operations(cls, skeleton: Skeleton, config: PruneConfig, kept: Sequence[float], order: Order) -> float:
        """Operations of the stage in all shots together.

        Args:
            skeleton: The model without its weights.
            config: The recipe, with the tokens of one process.
            kept: Share of the prunable weights that each shot leaves.
            order: Order of passes that take gradients.
        """
        return 0.0
