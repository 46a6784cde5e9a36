"""How much memory the passes of a run take: the run's own code on tensors that have shapes and types but no numbers.

Nothing about an architecture is written down here, and nothing is computed: each tensor that the code makes is counted
while it lives.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, masking_utils

from llm_surgeon.curvature import Estimation, estimate
from llm_surgeon.curvature.layer_statistics import watch
from llm_surgeon.curvature.nearest import TERMS, nearest_bytes
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.models import Anatomy
from llm_surgeon.passes.batch_major import Order, PassResult
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.passes.task import PUT_AWAY, Task
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.methods import LAYERWISE
from llm_surgeon.refit.gates import gate_width, gates_of, moments
from llm_surgeon.system.storage import Stored, TensorStore

# A model this deep is traced whole; of a deeper one, two shallow ones say what each further pair of blocks adds. A
# pair, because some families have blocks of two kinds in turn.
DEPTH = 4


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made under it, while they live; answers what depends on numbers.

    Attributes:
        now: Bytes that live now.
        peak: The most that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what is new in its results."""
        if func is torch.ops.aten._local_scalar_dense.default:
            # A number is asked for to see whether it is finite, a truth to see whether all is well.
            return args[0].dtype == torch.bool or 0
        if func is torch.ops.aten.nonzero.default:
            # Every position has a label but the last: one that has none is enough to select from the others.
            return args[0].new_zeros(max(1, args[0].numel() - 1), args[0].dim(), dtype=torch.int64)
        result = func(*args, **(kwargs or {}))
        for item in tree_leaves(result):
            if isinstance(item, Tensor):
                self._count(item.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known[key] = weakref.ref(storage, lambda _gone: self._forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def _forget(self, key: int, size: int) -> None:
        del self._known[key]
        self.now -= size


class _Nowhere(TensorStore):
    """A store that takes no room: what is asked for is made anew."""

    def put(self, tensor: Tensor) -> Stored:
        """Remember the shape."""
        # Zeros, so that a pass with numbers is a pass with finite ones.
        anew = partial(torch.zeros, tensor.shape, dtype=tensor.dtype, device=self.device)
        return Stored(anew, lambda: None)


class _Idle(Task):
    """A task whose pass reads nothing: what an estimator makes before it stays as it is."""

    def run(self, hooks: Hooks, *, backward: bool, finished: Callable[[int], None] = lambda _block: None) -> PassResult:
        """Nothing."""
        return PassResult(0.0, 1, 1)


@dataclass(frozen=True)
class Traces:
    """Bytes of tensors beside the weights, at the peak of each kind of pass.

    Attributes:
        curvature: Of a batch for the curvature, without its factors; 0 if there is none. Layer by layer it is without
            what waits in the store, and with the factors of one block.
        training: The same with gradients in any case, for corrections.
        evaluation: Of a window.
        waiting: Hidden states of a batch in front of a block, in layer-wise methods and for reconstruction.
        watching: Of a batch in a block that is watched, beside those.
        gates: Of a batch with gradients for the gates.
    """

    curvature: int = 0
    training: int = 0
    evaluation: int = 0
    waiting: int = 0
    watching: int = 0
    gates: int = 0


def trace(
    make: Callable[[], PreTrainedModel],
    anatomy: Anatomy,
    config: PruneConfig,
    device: torch.device,
    order: Order = "batch-major",
) -> Traces:
    """Send the passes of a run through a model without weights.

    Args:
        make: Makes the model; called where tensors have no numbers.
        anatomy: Its prunable layers.
        config: The recipe.
        device: Where the run is to be.
        order: Of the pass for the curvature.
    """
    tracer = _Tracer(make, anatomy, config, device)
    reads = not config.layerwise and config.resolved_curvature != "identity"
    waiting, watching = tracer.sweep() if config.layerwise or config.reconstruction else (0, 0)
    return Traces(
        curvature=tracer.batch(replace(estimation_of(config), order=order)) if reads else 0,
        training=tracer.batch(Estimation(config.lora_batch_size, config.precision)) if config.lora else 0,
        evaluation=tracer.window() if config.evaluation != "none" else 0,
        waiting=waiting,
        watching=watching,
        gates=tracer.gates(Estimation(config.sequences_per_pass, config.precision, order=order))
        if config.gate_steps
        else 0,
    )


class _Tracer:
    def __init__(
        self, make: Callable[[], PreTrainedModel], anatomy: Anatomy, config: PruneConfig, device: torch.device
    ) -> None:
        self._fake = FakeTensorMode()
        with self._fake:
            self._network = make()
        self._anatomy, self._config, self._device = anatomy, config, device
        self._gate_width = gate_width(anatomy, config)
        self._blocks = cast(nn.ModuleList, self._network.get_submodule(anatomy.family.blocks))
        self._all = list(self._blocks)

    def batch(self, how: Estimation) -> int:
        """Bytes beside weights and factors."""
        return self._by_depth(partial(self._estimate, how))

    def gates(self, how: Estimation) -> int:
        """Bytes beside the weights, with the effects of the gates at the tokens of the batch."""
        return self._by_depth(partial(self._moments, how))

    def window(self) -> int:
        """Bytes beside the weights."""
        return self._by_depth(self._evaluate)

    def sweep(self) -> tuple[int, int]:
        """Bytes of a batch in front of a block, and beside it at the peak of a block that is watched."""
        return self._by_depth(lambda layers: self._sweep(layers)[0]), self._sweep(self._layers(1))[1]

    def _by_depth(self, measure: Callable[[Anatomy], int]) -> int:
        """The bytes at full depth, from those of shallow models if it is deep."""
        depth = len(self._all)
        if depth <= DEPTH:
            return measure(self._layers(depth))
        more, less = (measure(self._layers(count)) for count in (DEPTH, DEPTH - 2))
        return more + round((more - less) / 2 * (depth - DEPTH))

    def _layers(self, depth: int) -> Anatomy:
        """Make the model so many blocks deep; returns what is left of its layers."""
        del self._blocks[:]
        self._blocks.extend(self._all[:depth])
        whole = self._anatomy
        layers = {name: layer for name, layer in whole.layers.items() if layer.block < depth}
        located = tuple(part for part in whole.located if part.block < depth)
        return replace(whole, blocks=depth, layers=layers, located=located)

    @contextmanager
    def _counted(self) -> Iterator[LiveBytes]:
        with self._fake, LiveBytes() as live, _no_packed_sequences():
            yield live

    def _tokens(self, samples: int) -> CalibrationTokens:
        shape = samples, self._config.seq_len
        return CalibrationTokens(torch.zeros(shape, dtype=torch.int64, device=self._device), None, {})

    def _estimate(self, how: Estimation, anatomy: Anatomy) -> int:
        with self._counted() as live:
            tokens = self._tokens(min(how.batch_size, self._config.samples))
            factors = estimate(self._network, anatomy, {}, tokens, how, store=_Nowhere(self._device))
            kept = how.order == "batch-major" or how.curvature not in PUT_AWAY
            return live.peak - (factors.nbytes if kept else 0)

    def _moments(self, how: Estimation, anatomy: Anatomy) -> int:
        dense = gates_of(anatomy, self._gate_width)
        gates = [replace(gated, members=self._fake.from_tensor(gated.members)) for gated in dense]
        with self._counted() as live:
            tokens = self._tokens(min(how.batch_size, self._config.samples))
            if gates:
                moments(Task(self._network, anatomy, {}, tokens, how, _nowhere, _Nowhere(self._device)), gates)
            return live.peak

    def _evaluate(self, _anatomy: Anatomy) -> int:
        window = self._config.eval_window
        with self._counted() as live:
            tokens = torch.zeros(window, dtype=torch.int64, device=self._device)
            perplexity(self._network, EvaluationText(tokens, "", window, window, self._config.precision))
            return live.peak

    def _sweep(self, anatomy: Anatomy) -> tuple[int, int]:
        config, layers = self._config, [layer for layer in anatomy.layers.values() if layer.block == 0]
        with self._counted() as live:
            tokens = self._tokens(min(config.sequences_per_pass, config.samples))
            sweep = Sweep(self._network, anatomy.family.blocks, tokens, config.sequences_per_pass, config.precision)
            held, live.peak = live.now, live.now
            # Reconstruction has fewer Gram matrices than this, and products of inputs and errors as large.
            grams = config.reconstruction or LAYERWISE[config.method].scope is None
            watch(self._network, sweep, 0, layers, grams=grams, advance=_nowhere)
            return held, live.peak - held


def estimation_of(config: PruneConfig) -> Estimation:
    """A pass like those of a recipe.

    A nearest product takes the same pairs of inputs and gradients as the exact diagonal. Where a recipe estimates no
    curvature, it is a forward pass that looks at inputs.
    """
    curvature = config.resolved_curvature
    samples = config.fisher_samples if config.fisher == "true" else 0
    if curvature in (None, "identity"):
        curvature = "activations"
    return Estimation(
        config.sequences_per_pass,
        config.precision,
        "diagonal" if curvature in TERMS else curvature,
        samples,
        gradient_share=config.gradient_share,
        seed=config.seed,
    )


def factor_bytes(network: PreTrainedModel, anatomy: Anatomy, config: PruneConfig) -> int:
    """Bytes of the factors of all layers: those of ``Curvature.nbytes`` after an estimation on the dense model.

    Args:
        network: The model, on the meta device for example.
        anatomy: Its prunable layers.
        config: The recipe.
    """
    curvature = config.resolved_curvature
    if curvature in TERMS:
        sizes = [(layer.rows, layer.columns, layer.bias) for layer in anatomy.layers.values()]
        return nearest_bytes(sizes, TERMS[curvature])
    if curvature in (None, "identity"):
        return 0
    tokens = CalibrationTokens(torch.zeros(1, 1, dtype=torch.int64), None, {})
    return estimate(network, anatomy, {}, tokens, estimation_of(config), make_task=_Idle).nbytes


def _none(position_ids: Tensor) -> Tensor | None:
    """No position begins another sequence."""


def _nowhere(_tokens: int) -> None:
    """Nobody is told of progress."""


@contextmanager
def _no_packed_sequences() -> Iterator[None]:
    """Let transformers take a batch for what it is: whole sequences, which need no mask.

    It looks at the numbers of the positions to see that, and where there are none it makes a mask to be safe; with
    one, key and value heads are copied for every query head that shares them.
    """
    before = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = _none
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = before
