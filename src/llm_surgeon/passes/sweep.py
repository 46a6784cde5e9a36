"""Sweep through a model block by block: the call of each block is recorded once, and replayed as often as is needed.

The arguments of a block (masks, positions, rotary embeddings) are made by transformers and change with its releases.
They are not rebuilt here: one pass through the model, with blocks that do nothing, records the arguments of each call.
The model itself runs its parts before and after the blocks, in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.attention import attention_by_blocks
from llm_surgeon.models.modes import arithmetic, frozen, reduced_weights
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.passes.head import last_states
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.system.storage import Stored, TensorStore, in_turn

Advance = Callable[[int], None]


@dataclass(frozen=True)
class _Call:
    """Arguments of the call of one block for one batch, beside the hidden states."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class Batch:
    """One batch on its way through the blocks.

    Attributes:
        input_ids: ``[batch, length]``.
        attention_mask: ``[batch, length]``, or None where nothing is padding.
        hidden: Hidden states that enter the present block, ``[batch, length, width]``.
        positions: Flat positions of the tokens that hooks see: those that are no padding, unless set otherwise.
        calls: The call of each block.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    hidden: Stored
    positions: Tensor
    calls: list[_Call]


class Sweep:
    """All batches of calibration tokens on their way through the blocks; at first they are in front of the first block.

    Hidden states of all tokens are kept, ``[tokens, width]`` in the type that the model computes them in.

    Args:
        model: A causal language model.
        blocks: Path of its list of decoder blocks.
        tokens: Calibration tokens.
        batch_size: Sequences per batch.
        precision: ``bfloat16`` (autocast) or ``float32``.
        store: Store of the hidden states; if None, the memory of the model's device.
        fast_attention: Whether ``attention_by_blocks`` may stand in for the model's own attention.

    Attributes:
        batches: The batches, in order.
        store: Store of the hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: str,
        tokens: CalibrationTokens,
        batch_size: int,
        precision: str,
        store: TensorStore | None = None,
        *,
        fast_attention: bool = True,
    ) -> None:
        self._model, self._precision, self._fast = model, precision, fast_attention
        self._blocks = cast(nn.ModuleList, model.get_submodule(blocks))
        self._stand_in = _StandIn(self._blocks)
        self._device = next(model.parameters()).device
        self.store = store or TensorStore(self._device)
        with torch.no_grad(), frozen(model):
            self.batches = list(self._record(tokens, batch_size))

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._blocks)

    def watch(self, block: int, hooks: Hooks, advance: Advance = lambda _tokens: None) -> None:
        """Run a block for its hooks only; the batches stay in front of it."""
        with torch.no_grad(), self.ready(block):
            for batch, entering in self.entering():
                hooks.positions = batch.positions
                self.run(block, batch, entering.get())
                advance(batch.input_ids.numel())

    def pass_through(
        self, block: int, advance: Advance = lambda _tokens: None, keep: bool = False, hooks: Hooks | None = None
    ) -> None:
        """Take the batches through a block, in front of the next one; to be called for each block in turn.

        Args:
            block: Number of the block.
            advance: Called with the number of tokens after each batch.
            keep: Whether the hidden states that entered the block stay in the store, because the caller holds them.
            hooks: Hooks that look on.
        """
        with torch.no_grad(), self.ready(block, then=block + 1):
            for batch, entering in self.entering():
                if hooks is not None:
                    hooks.positions = batch.positions
                batch.hidden = self.store.put(self.run(block, batch, entering.get()))
                if not keep:
                    entering.release()
                advance(batch.input_ids.numel())

    def entering(self) -> Iterator[tuple[Batch, Stored]]:
        """Go through the batches with the inputs of the present block; the next inputs are on their way meanwhile."""
        return zip(self.batches, in_turn([batch.hidden for batch in self.batches]), strict=True)

    def run(self, block: int, batch: Batch, hidden: Tensor) -> Tensor:
        """Run a block on hidden states ``[batch, length, width]``; to be called within ``ready``."""
        call = batch.calls[block]
        with arithmetic(self._device, self._precision):
            output = self._blocks[block](hidden, *call.arguments, **call.named)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def last_states(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Last hidden states, flat ``[batch * length, width]``, from the outputs ``hidden`` of the last block."""
        with self._stand_in.installed(hidden), arithmetic(self._device, self._precision):
            return last_states(self._model, batch.input_ids, batch.attention_mask)

    @contextmanager
    def ready(self, block: int, then: int | None = None) -> Iterator[None]:
        """Make a block ready to run: frozen, with weights and attention as the precision allows.

        Args:
            block: Number of the block.
            then: Number of the block that comes next, if there is one; its weights are on their way meanwhile.
        """
        self.store.keep_within()
        module = self._blocks[block]
        weights, attention = weights_of(self._model), attention_by_blocks() if self._fast else nullcontext()
        with weights.present(module), frozen(module), reduced_weights(module, self._precision), attention:
            if then is not None and 0 <= then < len(self._blocks):
                weights.expect(self._blocks[then])
            yield

    def _record(self, tokens: CalibrationTokens, batch_size: int) -> Iterator[Batch]:
        former: list[_Call] = []
        for input_ids, attention_mask in tokens.batches(batch_size):
            real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
            ids = input_ids.to(self._device)
            mask = None if attention_mask is None else attention_mask.to(self._device)
            with self._stand_in.installed(), arithmetic(self._device, self._precision):
                last_states(self._model, ids, mask)
            positions = real.flatten().nonzero().flatten().to(self._device)
            calls = self._stand_in.calls
            if len(former) == len(calls):
                calls = [_shared(call, before) for call, before in zip(calls, former, strict=True)]
            former = calls
            yield Batch(ids, mask, self.store.put(self._stand_in.entered), positions, calls)


def _shared(call: _Call, former: _Call) -> _Call:
    """The call of a block with what is equal in the call of another batch, which is then held once for all batches."""
    arguments, former_arguments = (tree_flatten((one.arguments, one.named)) for one in (call, former))
    if arguments[1] != former_arguments[1]:
        return call
    leaves = [_same(*pair) for pair in zip(arguments[0], former_arguments[0], strict=True)]
    return _Call(*tree_unflatten(leaves, arguments[1]))


def _same(value: Any, former: Any) -> Any:
    if not (isinstance(value, Tensor) and isinstance(former, Tensor)) or value is former:
        return value
    # In a plan tensors have no numbers, and those of one shape count as equal.
    alike = value.shape == former.shape and value.dtype == former.dtype and value.device == former.device
    return former if alike and torch.equal(value, former) else value


class _StandIn:
    """Stand-in for the forward functions of all blocks, which records their calls and hands the input on.

    Attributes:
        entered: Hidden states that entered the first block.
        calls: The call of each block.
    """

    entered: Tensor

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.calls: list[_Call] = []
        self._blocks, self._first = blocks, blocks[0].forward
        self._tuples: bool | None = None
        self._handed: Tensor | None = None

    def __call__(self, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        """Record a call of a block's ``forward``, and return its input or the hidden states handed over."""
        if self._tuples is None:
            # In some releases of transformers a block returns a tuple, and the model around it expects one.
            self._tuples = isinstance(self._first(hidden, *arguments, **named), tuple)
        if not self.calls:
            self.entered = hidden
        self.calls.append(_Call(arguments, named))
        handed = hidden if self._handed is None else self._handed
        return (handed,) if self._tuples else handed

    @contextmanager
    def installed(self, handed: Tensor | None = None) -> Iterator[None]:
        """Install the stand-in as the ``forward`` of every block for one batch.

        Args:
            handed: Hidden states that leave the blocks; if None, those that entered them.
        """
        self.calls, self._handed = [], handed
        # An attribute of the instance hides the method of the class; there may be one already.
        before = [vars(block).get("forward") for block in self._blocks]
        try:
            for block in self._blocks:
                block.forward = self
            yield
        finally:
            self._handed = None
            for block, own in zip(self._blocks, before, strict=True):
                vars(block).pop("forward", None)
                if own is not None:
                    block.forward = own
