"""The socket for stages after a shot, each of which fits the weights that the shot has left.

A stage is a class with a name. A run makes one instance of each class that its recipe wants, and keeps it for all of
its shots. Plan, progress, record, report page and checkpoint loop over the stages and know none by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


def _untold(_done: int, _kept: Mapping[str, Tensor]) -> None:
    """Steps that nobody keeps."""


@dataclass(frozen=True)
class Steps:
    """Steps of a fit that a later process need not take again.

    A fit may call ``tell`` after each step from which it could go on. If the process ends, the fit is called again in
    another one with the number of the last step that was kept, on the model as that step had left it.

    Attributes:
        done: Number of steps that an earlier process has taken.
        kept: Tensors that it told with the last of them.
        tell: Function that takes the number of steps taken so far, and tensors to be kept beside the weights.
    """

    done: int = 0
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    tell: Callable[[int, Mapping[str, Tensor]], None] = _untold


@dataclass(frozen=True)
class Shot:
    """A shot whose removals are done.

    Attributes:
        number: Number of the shot, from 1.
        keep: Masks of the rows and columns that are left of each layer, which agree with the model.
        elements: Kept weights of each layer, ``[rows, columns]`` bool, if zeros are stored; None if matrices shrink.
        steps: Steps of the fit under way.
    """

    number: int
    keep: Mapping[str, KeepMask]
    elements: Mapping[str, Tensor] | None = None
    steps: Steps = field(default_factory=Steps)


@dataclass(frozen=True)
class Fitted:
    """Figures of one fit, and a note that explains them in a sentence or two."""

    figures: tuple[Figure, ...] = ()
    note: str = ""


class LiveBytes(Protocol):
    """Bytes of the tensors that a traced pass makes: tensors that live now, and the most that lived at once."""

    now: int
    peak: int


Measure = Callable[[LiveBytes], int]


class Tracer(Protocol):
    """A runner of a stage's code on a model whose tensors have shapes and types but no numbers.

    Attributes:
        anatomy: Prunable layers of the model at full depth.
    """

    anatomy: Anatomy

    def fake(self, tensor: Tensor) -> Tensor:
        """Make a tensor without numbers, of the same shape and type, for code under the tracer."""

    def by_depth(self, prepare: Callable[[Session], Measure], sequences: int | None = None) -> int:
        """Bytes of a pass on the whole model; the bytes of a deep model follow from two shallow ones.

        Args:
            prepare: Function that makes the measure of one batch in a session without numbers, whose tokens are that
                batch, and whose dense model is the model itself. It is called where tensors have numbers. The measure
                runs the batch, and returns the bytes beside the weights.
            sequences: Number of sequences of the batch; None takes as many as a pass of the recipe has.
        """


class TracedBytes(Protocol):
    """Bytes that passes of a run take beside the weights, as far as stages ask for them.

    Attributes:
        waiting: Bytes of the hidden states of one batch in front of a block.
        watching: Bytes of a batch in a block that is watched, beside its hidden states in front of the block.
        stages: Bytes that ``Stage.trace`` found, by the stage's name.
    """

    @property
    def waiting(self) -> int: ...  # noqa: D102 - see the class

    @property
    def watching(self) -> int: ...  # noqa: D102 - see the class

    @property
    def stages(self) -> Mapping[str, int]: ...  # noqa: D102 - see the class


class Stage(ABC):
    """One stage of a run, made once for all of its shots.

    A new stage needs a name, ``work`` and ``fit``, and a row in ``stages.STAGES``; ``stages.register_stage`` adds the
    row. Everything else has a default.

    Attributes:
        name: Name of the stage's phase in plan, progress, record and report.
        half: Text that the stage takes under cross-fitting: the ``own`` half, the ``other`` half, or ``whole`` for a
            stage that runs once after both halves.
        needs_dense: Whether the stage needs the dense model beside the pruned one (``session.dense``).
        sweeps: Whether the stage passes all text through the model block by block.
        decomposes: Whether the stage decomposes matrices of the size of a layer's sides.
        backward: Whether the stage's passes take gradients.
        waits: Name of the tensors that wait while the stage works, see ``waiting``.
        streams: Whether the stage can work with streamed weights.
    """

    name: ClassVar[str]
    half: ClassVar[Literal["own", "other", "whole"]] = "whole"
    needs_dense: ClassVar[bool] = False
    sweeps: ClassVar[bool] = False
    decomposes: ClassVar[bool] = False
    backward: ClassVar[bool] = False
    waits: ClassVar[str] = "tensors that wait"
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
        """Check, before any work, that the stage is possible on this machine.

        Raises:
            ConfigError: If something is missing, such as an optional package.
        """
        return

    @classmethod
    def resolved(cls, config: PruneConfig, anatomy: Anatomy) -> PruneConfig:
        """The recipe with the stage's options that depend on the whole text, set before processes share the text."""
        return config

    @classmethod
    def check_model(cls, session: Session) -> None:
        """Check on the dense model that the stage is possible, and warn if it will not help.

        Raises:
            SurgeonError: If the stage is not possible for this model.
        """
        return

    @classmethod
    def changes(cls, model: nn.Module, anatomy: Anatomy) -> list[str]:
        """Names of parameters that the stage changes beside the prunable layers, for the checkpoints."""
        return []

    def begin(self) -> None:
        """Prepare data that all fits share, once, before the progress of the first fit is shown."""
        return

    @abstractmethod
    def work(self, shot: Shot, half: int | None) -> int:
        """Number of tokens that ``fit`` reports as its progress, in total."""

    @abstractmethod
    def fit(self, shot: Shot, half: int | None, advance: Advance) -> Fitted:
        """Fit the weights that are left, in place.

        Args:
            shot: The shot whose removals are done.
            half: Half of the calibration sequences to take, 0 or 1; None takes all.
            advance: Function that is called with the number of tokens of each pass.

        Returns:
            Figures for the record.
        """

    @classmethod
    def trace(cls, tracer: Tracer, config: PruneConfig) -> int:
        """Bytes that one batch of the stage's largest pass takes beside the weights; 0 without a pass of its own."""
        return 0

    @classmethod
    def memory(cls, skeleton: Skeleton, config: PruneConfig, traced: TracedBytes) -> Parts:
        """Bytes of the stage's peak where the model runs, by the name of each part, beside weights and what waits."""
        return {"passes": traced.stages.get(cls.name, 0)}

    @classmethod
    def waiting(cls, skeleton: Skeleton, config: PruneConfig, order: Order) -> int:
        """Bytes of the tensors that wait: in the session's store or, batch by batch, where the model runs."""
        return 0

    @classmethod
    def operations(cls, skeleton: Skeleton, config: PruneConfig, kept: Sequence[float], order: Order) -> float:
        """Floating-point operations of the stage in all shots together.

        Args:
            skeleton: The model without its weights.
            config: The recipe, with the tokens of one process.
            kept: Share of the prunable weights that each shot leaves.
            order: Order of the passes that take gradients.
        """
        return 0.0
