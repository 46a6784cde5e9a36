"""Running a model block by block: what entered a block is recorded once, and replayed as often as is needed.

The arguments of a block (masks, positions, rotary embeddings) are made by transformers and change with its releases.
They are not rebuilt here: one pass through the model, with blocks that do nothing, records what each is called with.
What comes before and after the blocks is run in the same way, by the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
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
    """What one block was called with for one batch, beside the hidden states."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class Batch:
    """One batch on its way through the blocks.

    Attributes:
        input_ids: ``[batch, length]``.
        attention_mask: The same shape, or None where nothing is padding.
        hidden: Hidden states that enter the block whose turn it is, ``[batch, length, width]``.
        positions: Flat positions of the tokens that hooks see: those that are no padding, unless set otherwise.
        calls: The call of each block.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    hidden: Stored
    positions: Tensor
    calls: list[_Call]


class Sweep:
    """All batches of calibration tokens, in front of the first block at first.

    Hidden states of all tokens are kept, ``[tokens, width]`` in the type that the model computes them in.

    Args:
        model: A causal language model.
        blocks: Path of its list of decoder blocks.
        tokens: Calibration tokens.
        batch_size: Sequences per pass.
        precision: ``bfloat16`` (autocast) or ``float32``.
        store: Where the hidden states are kept; in the memory of the model's device if None.
        fast_attention: Whether ``attention_by_blocks`` may stand in for the model's own attention.

    Attributes:
        batches: In order.
        store: Where hidden states are kept.
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
        """Blocks."""
        return len(self._blocks)

    def watch(self, block: int, hooks: Hooks, advance: Advance = lambda _tokens: None) -> None:
        """Run a block for what ``hooks`` see of it; the batches stay in front of it."""
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
            block: Its number.
            advance: Called with the number of tokens after each batch.
            keep: Whether what entered the block stays in the store, as somebody else holds it.
            hooks: What looks on.
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
        """The batches, each with what enters the block whose turn it is: on its way while the batch before is used."""
        return zip(self.batches, in_turn([batch.hidden for batch in self.batches]), strict=True)

    def run(self, block: int, batch: Batch, hidden: Tensor) -> Tensor:
        """What a block makes of hidden states ``[batch, length, width]``; to be called where it is ``ready``."""
        call = batch.calls[block]
        with arithmetic(self._device, self._precision):
            output = self._blocks[block](hidden, *call.arguments, **call.named)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def last_states(self, batch: Batch, hidden: Tensor) -> Tensor:
        """What the model makes of what leaves its last block: last hidden states, flat, ``[batch * length, width]``."""
        with self._stand_in.installed(hidden), arithmetic(self._device, self._precision):
            return last_states(self._model, batch.input_ids, batch.attention_mask)

    @contextmanager
    def ready(self, block: int, then: int | None = None) -> Iterator[None]:
        """The block as it is run: frozen, with weights and attention as the precision allows.

        Args:
            block: Its number.
            then: Of the block that comes next, if there is one; its weights are on their way meanwhile.
        """
        self.store.keep_within()
        module = self._blocks[block]
        weights, attention = weights_of(self._model), attention_by_blocks() if self._fast else nullcontext()
        with weights.present(module), frozen(module), reduced_weights(module, self._precision), attention:
            if then is not None and 0 <= then < len(self._blocks):
                weights.expect(self._blocks[then])
            yield

    def _record(self, tokens: CalibrationTokens, batch_size: int) -> Iterator[Batch]:
        for input_ids, attention_mask in tokens.batches(batch_size):
            real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
            ids = input_ids.to(self._device)
            mask = None if attention_mask is None else attention_mask.to(self._device)
            with self._stand_in.installed(), arithmetic(self._device, self._precision):
                last_states(self._model, ids, mask)
            positions = real.flatten().nonzero().flatten().to(self._device)
            yield Batch(ids, mask, self.store.put(self._stand_in.entered), positions, self._stand_in.calls)


class _StandIn:
    """Stands in for the forward functions of all blocks: keeps what they are called with and hands on the input.

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
        """Take the place of a block's ``forward``."""
        if self._tuples is None:
            # Some releases of transformers return a tuple, and the model around the block expects what it returns.
            self._tuples = isinstance(self._first(hidden, *arguments, **named), tuple)
        if not self.calls:
            self.entered = hidden
        self.calls.append(_Call(arguments, named))
        handed = hidden if self._handed is None else self._handed
        return (handed,) if self._tuples else handed

    @contextmanager
    def installed(self, handed: Tensor | None = None) -> Iterator[None]:
        """Be the ``forward`` of every block for one batch.

        Args:
            handed: What leaves the blocks, if it is not what entered them.
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
