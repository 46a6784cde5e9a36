"""Running a model block by block: what entered a block is recorded once, and replayed as often as is needed.

The arguments of a block (masks, positions, rotary embeddings) are made by transformers and change with its releases.
They are not rebuilt here: one pass through the model, with blocks that do nothing, records what each is called with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.curvature.hooks import Hooks
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.head import last_states
from llm_surgeon.models.modes import arithmetic, frozen

Advance = Callable[[int], None]


@dataclass(frozen=True)
class _Call:
    """What one block was called with for one batch, beside the hidden states."""

    arguments: tuple[Any, ...]
    named: dict[str, Any]


@dataclass
class _Batch:
    """One batch on its way through the blocks.

    Attributes:
        hidden: Hidden states that enter the block whose turn it is, ``[batch, length, width]``.
        positions: Flat positions of real tokens.
        calls: The call of each block.
    """

    hidden: Tensor
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
    """

    def __init__(
        self, model: PreTrainedModel, blocks: str, tokens: CalibrationTokens, batch_size: int, precision: str
    ) -> None:
        self._model, self._precision = model, precision
        self._blocks = cast(nn.ModuleList, model.get_submodule(blocks))
        self._device = next(model.parameters()).device
        with self._running():
            self._batches = list(self._record(tokens, batch_size))

    def watch(self, block: int, hooks: Hooks, advance: Advance = lambda _tokens: None) -> None:
        """Run a block for what ``hooks`` see of it; the batches stay in front of it."""
        with self._running():
            for batch in self._batches:
                hooks.positions = batch.positions
                self._run(block, batch)
                advance(batch.hidden.shape[:2].numel())

    def pass_through(self, block: int, advance: Advance = lambda _tokens: None) -> None:
        """Take the batches through a block, in front of the next one; to be called for each block in turn."""
        with self._running():
            for batch in self._batches:
                batch.hidden = self._run(block, batch)
                advance(batch.hidden.shape[:2].numel())

    def _run(self, block: int, batch: _Batch) -> Tensor:
        call = batch.calls[block]
        output = self._blocks[block](batch.hidden, *call.arguments, **call.named)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    @contextmanager
    def _running(self) -> Iterator[None]:
        with torch.no_grad(), frozen(self._model), arithmetic(self._device, self._precision):
            yield

    def _record(self, tokens: CalibrationTokens, batch_size: int) -> Iterator[_Batch]:
        recorder = _Recorder(self._blocks)
        for input_ids, attention_mask in tokens.batches(batch_size):
            real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
            mask = None if attention_mask is None else attention_mask.to(self._device)
            with recorder.in_place():
                last_states(self._model, input_ids.to(self._device), mask)
            positions = real.flatten().nonzero().flatten().to(self._device)
            yield _Batch(recorder.entered, positions, recorder.calls)


class _Recorder:
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

    def __call__(self, hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        """Take the place of a block's ``forward``."""
        if self._tuples is None:
            # Some releases of transformers return a tuple, and the model around the block expects what it returns.
            self._tuples = isinstance(self._first(hidden, *arguments, **named), tuple)
        if not self.calls:
            self.entered = hidden
        self.calls.append(_Call(arguments, named))
        return (hidden,) if self._tuples else hidden

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Be the ``forward`` of every block for one batch."""
        self.calls = []
        # An attribute of the instance hides the method of the class; there may be one already.
        before = [vars(block).get("forward") for block in self._blocks]
        try:
            for block in self._blocks:
                block.forward = self
            yield
        finally:
            for block, own in zip(self._blocks, before, strict=True):
                vars(block).pop("forward", None)
                if own is not None:
                    block.forward = own
