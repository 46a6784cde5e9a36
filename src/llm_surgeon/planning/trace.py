"""Traced memory of a run's passes: the run's own code works on tensors that have shapes and types but no numbers.

Each tensor that the code makes is counted while it lives. Nothing is computed, and no architecture is described here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, masking_utils

from llm_surgeon.curvature import ESTIMATORS, Estimation, estimate, estimation_of, estimator_of
from llm_surgeon.curvature.layer_statistics import watch
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.models import Anatomy
from llm_surgeon.passes.batch_major import Order
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.pruning.loops import loop_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.refit.stage import LiveBytes, Measure
from llm_surgeon.refit.stages import stages_of
from llm_surgeon.session.session import Session
from llm_surgeon.system.storage import Stored, TensorStore

# Largest depth of a model that is traced whole. For a deeper model, two shallow ones show how many bytes each further
# pair of blocks adds. It is a pair, as some families alternate between two kinds of blocks.
DEPTH = 4


class CountedBytes(TorchDispatchMode):
    """Counter of the bytes of all tensors that are made under it, while they live; it answers for missing numbers.

    Args:
        given: Tensors that do not count, such as weights: the results of some operations are views of them.

    Attributes:
        now: Bytes of the tensors that live now.
        peak: Largest bytes that lived at once.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in given:
            self._know(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and count the new tensors among its results."""
        if func is torch.ops.aten._local_scalar_dense.default:
            # The run asks for a number only to check that it is finite, and for a bool to check that all is well.
            return args[0].dtype == torch.bool or 0
        if func is torch.ops.aten.nonzero.default:
            # Every position but the last has a label.
            return args[0].new_zeros(max(1, args[0].numel() - 1), args[0].dim(), dtype=torch.int64)
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._count(item.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._know(storage, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _know(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self._known[key] = weakref.ref(storage, lambda _gone: self._forget(key, size))

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class _Nowhere(TensorStore):
    """A store that takes no memory: a stored tensor is made anew when it is asked for."""

    def put(self, tensor: Tensor) -> Stored:
        """Remember the shape of a tensor."""
        # Zeros keep a pass with numbers finite.
        anew = partial(torch.zeros, tensor.shape, dtype=tensor.dtype, device=self.device)
        return Stored(anew, lambda: None)


@dataclass(frozen=True)
class Traces:
    """Bytes of tensors beside the weights, at the peak of each kind of pass.

    Attributes:
        curvature: Bytes of a batch for the curvature, without its factors; 0 if there is no pass. For a layer-major
            pass they are without hidden states that wait in the store, and with the factors of one block.
        evaluation: Bytes of a window of the evaluation text.
        waiting: Bytes of the hidden states of a batch in front of a block, in loops and stages that go from block to
            block.
        watching: Bytes of a batch in a block that is watched, beside its hidden states in front of the block.
        stages: Bytes of the largest pass of each stage, see ``Stage.trace``.
    """

    curvature: int = 0
    evaluation: int = 0
    waiting: int = 0
    watching: int = 0
    stages: Mapping[str, int] = field(default_factory=dict)


def trace(
    make: Callable[[], PreTrainedModel],
    anatomy: Anatomy,
    config: PruneConfig,
    device: torch.device,
    order: Order = "batch-major",
) -> Traces:
    """Send the passes of a run through a model without weights.

    Args:
        make: Function that makes the model; it is called where tensors have no numbers.
        anatomy: Prunable layers of the model.
        config: The recipe.
        device: Device of the run.
        order: Order of the passes that take gradients.
    """
    tracer = ShapeTracer(make, anatomy, config, device, order)
    estimator, stages = estimator_of(config), stages_of(config)
    reads = estimator is not None and estimator.passes(estimation_of(config), warm=False) > 0
    sweeps = loop_of(config).sweeps or any(stage.sweeps for stage in stages)
    waiting, watching = tracer.sweep() if sweeps else (0, 0)
    return Traces(
        curvature=tracer.estimation() if reads else 0,
        evaluation=tracer.window() if config.evaluates else 0,
        waiting=waiting,
        watching=watching,
        stages={stage.name: stage.trace(tracer, config) for stage in stages},
    )


@dataclass(frozen=True)
class _TracedSession(Session):
    """A session whose store takes no memory in either order."""

    traced: Order = "batch-major"

    @property
    def order(self) -> Order:
        """The order that is traced."""
        return self.traced


class ShapeTracer:
    """A model without weights, and the bytes that code of a run takes on it; see ``refit.stage.Tracer``."""

    def __init__(
        self,
        make: Callable[[], PreTrainedModel],
        anatomy: Anatomy,
        config: PruneConfig,
        device: torch.device,
        order: Order,
    ) -> None:
        self._mode = FakeTensorMode()
        with self._mode:
            self._network = make()
        self.anatomy = anatomy
        self._config, self._device, self._order = config, device, order
        self._blocks = cast(nn.ModuleList, self._network.get_submodule(anatomy.family.blocks))
        self._all = list(self._blocks)

    def fake(self, tensor: Tensor) -> Tensor:
        """Make a tensor without numbers, of the same shape and type; see ``Tracer.fake``."""
        return cast(Tensor, self._mode.from_tensor(tensor))

    def by_depth(self, prepare: Callable[[Session], Measure], sequences: int | None = None) -> int:
        """Bytes of a pass at full depth, from two shallow models if the model is deep; see ``Tracer.by_depth``."""

        def measured(depth: int) -> int:
            return self._measured(self._layers(depth), prepare, sequences)

        depth = len(self._all)
        if depth <= DEPTH:
            return measured(depth)
        more, less = (measured(count) for count in (DEPTH, DEPTH - 2))
        return more + round((more - less) / 2 * (depth - DEPTH))

    def estimation(self) -> int:
        """Bytes of a batch for the curvature, beside weights and factors."""
        how = replace(traced_estimation(self._config), order=self._order)
        kept = self._order == "batch-major" or not ESTIMATORS[how.curvature].puts_away

        def prepare(session: Session) -> Measure:
            def measure(live: LiveBytes) -> int:
                factors = estimate(session, {}, how)
                return live.peak - (factors.nbytes if kept else 0)

            return measure

        return self.by_depth(prepare)

    def window(self) -> int:
        """Bytes of a window of the evaluation text, beside the weights."""
        length, precision = self._config.eval_window, self._config.precision

        def prepare(session: Session) -> Measure:
            def measure(live: LiveBytes) -> int:
                tokens = torch.zeros(length, dtype=torch.int64, device=self._device)
                perplexity(session.model, EvaluationText(tokens, "", length, length, precision))
                return live.peak

            return measure

        return self.by_depth(prepare)

    def sweep(self) -> tuple[int, int]:
        """Bytes of a batch's hidden states in front of a block, and of the watched block beside them at its peak."""
        held = self.by_depth(lambda session: lambda live: self._sweep(session, live)[0])
        return held, self._measured(self._layers(1), lambda session: lambda live: self._sweep(session, live)[1])

    def _sweep(self, session: Session, live: LiveBytes) -> tuple[int, int]:
        config, layers = self._config, [layer for layer in session.anatomy.layers.values() if layer.block == 0]
        blocks, batch = session.anatomy.family.blocks, config.sequences_per_pass
        sweep = Sweep(session.model, blocks, session.tokens, batch, config.precision)
        held, live.peak = live.now, live.now
        # Stages that go from block to block have fewer Gram matrices than a solver, but other products of that size.
        grams = loop_of(config).watches_grams(config)
        watch(session.model, sweep, 0, layers, grams=grams, advance=lambda _tokens: None)
        return held, live.peak - held

    def _measured(self, anatomy: Anatomy, prepare: Callable[[Session], Measure], sequences: int | None = None) -> int:
        count = min(sequences or self._config.sequences_per_pass, self._config.samples)
        live = CountedBytes(chain(self._network.parameters(), self._network.buffers()))
        with self._mode, live:
            ids = torch.zeros(count, self._config.seq_len, dtype=torch.int64, device=self._device)
        tokens, store = CalibrationTokens(ids, None, {}), _Nowhere(self._device)
        network, config = self._network, self._config
        session = _TracedSession(network, anatomy, tokens, config, store=store, dense=network, traced=self._order)
        measure = prepare(session)
        with self._mode, live, _no_packed_sequences():
            return measure(live)

    def _layers(self, depth: int) -> Anatomy:
        """Make the model ``depth`` blocks deep, and return the anatomy of these blocks."""
        del self._blocks[:]
        self._blocks.extend(self._all[:depth])
        whole = self.anatomy
        layers = {name: layer for name, layer in whole.layers.items() if layer.block < depth}
        located = tuple(part for part in whole.located if part.block < depth)
        return replace(whole, blocks=depth, layers=layers, located=located)


def traced_estimation(config: PruneConfig) -> Estimation:
    """Estimation whose passes take as much memory as the recipe's, beside the factors."""
    how = estimation_of(config)
    return replace(how, curvature=cast(Any, ESTIMATORS[how.curvature].stand_in or how.curvature))


def factor_bytes(network: PreTrainedModel, anatomy: Anatomy, config: PruneConfig) -> int:
    """Bytes of the factors of all layers: ``Curvature.nbytes`` after an estimation on the dense model.

    Args:
        network: The model, on the meta device for example.
        anatomy: Prunable layers of the model.
        config: The recipe.
    """
    estimator = estimator_of(config)
    return 0 if estimator is None else estimator.factor_bytes(network, anatomy, estimation_of(config))


def _none(position_ids: Tensor) -> Tensor | None:
    """Answer for ``find_packed_sequence_indices``: no position begins another sequence."""


@contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """Let transformers treat a batch as whole sequences, which need no mask.

    Transformers reads the numbers of the positions to see that. Without numbers it makes a mask to be safe, and with a
    mask it copies key and value heads for every query head that shares them.
    """
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _none
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before
