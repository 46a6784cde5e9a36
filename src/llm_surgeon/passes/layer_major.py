"""Layer-major pass: the pass of ``batch_major.py`` with all batches through one block before the next.

Forward, the inputs of each block are kept. The head gives the gradient at the outputs of the last block. Backward, from
the last block to the first, a block is run once more on its inputs, now with a graph, and hands the gradient down. Only
one block's activations and sums exist at a time, at the price of one more forward pass. Hidden states and gradients of
all tokens, ``[tokens, width]`` each, wait in a store.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models.modes import arithmetic, frozen, reduced_weights
from llm_surgeon.models.overflow import loss_not_finite
from llm_surgeon.passes.batch_major import Advance, Estimation, LabelledBatch, PassResult, label_draws, sample_of
from llm_surgeon.passes.draws import TokenSample
from llm_surgeon.passes.head import head_loss, sample_labels
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.sweep import Batch, Sweep
from llm_surgeon.system.processes import Processes
from llm_surgeon.system.storage import Stored, TensorStore, in_turn


@dataclass
class _Waiting:
    """A batch on its way back.

    Attributes:
        batch: The batch.
        labelled: Its tokens with their labels.
        first: Number of its first sequence among those of all processes.
        sample: The tokens that gradients are summed over; None takes all that have a label.
        gradients: Gradients at the outputs of the present block, ``[batch, length, width]``, one per draw of labels.
    """

    batch: Batch
    labelled: LabelledBatch
    first: int
    sample: TokenSample | None
    gradients: list[Stored] = field(default_factory=list)


class LayerMajorPass:
    """One pass over the calibration tokens.

    Args:
        model: A causal language model.
        blocks: Path of its list of decoder blocks.
        tokens: Calibration tokens of this process.
        how: Batches, precision and labels.
        advance: Called with numbers of tokens that add up to all tokens once.
        processes: Processes that read the other tokens; the result counts these too.
        store: Store of the hidden states and gradients.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: str,
        tokens: CalibrationTokens,
        how: Estimation,
        advance: Advance,
        processes: Processes,
        store: TensorStore,
    ) -> None:
        self._model, self._how, self._processes = model, how, processes
        self._sweep = Sweep(model, blocks, tokens, how.batch_size, how.precision, store)
        self._waiting: list[_Waiting] = []
        sequence = tokens.first
        for batch in self._sweep.batches:
            labelled = LabelledBatch(batch.input_ids, batch.attention_mask)
            batch.positions = labelled.positions
            self._waiting.append(_Waiting(batch, labelled, sequence, sample_of(labelled, sequence, how)))
            sequence += len(batch.input_ids)
        self._device = next(model.parameters()).device
        self._progress = Repeated(advance)

    def run(self, hooks: Hooks, *, backward: bool, finished: Callable[[int], None]) -> PassResult:
        """Run every batch through the model; hooks see inputs and, if ``backward``, gradients.

        Args:
            hooks: Hooks that look on.
            backward: Whether gradients are taken.
            finished: Called with the number of a block once hooks will see nothing more of it.

        Raises:
            NonFiniteError: If the loss is not finite.
        """
        self._progress.parts = len(self._sweep) * (2 if backward else 1)
        entered = []
        for block in range(len(self._sweep)):
            entered.append([batch.hidden for batch in self._sweep.batches])
            # Without a backward pass hooks look on now; else they see the block when it is run again.
            hooks.positions = None
            self._sweep.pass_through(block, self._progress.advance, keep=backward, hooks=None if backward else hooks)
            if not backward:
                finished(block)
        loss = self._through_the_head(backward)
        for block in reversed(range(len(self._sweep))) if backward else ():
            self._backward(block, entered.pop(), hooks)
            finished(block)
        for waiting in self._waiting:
            for gradient in waiting.gradients:
                gradient.release()
        count = sum(len(waiting.labelled.positions) for waiting in self._waiting)
        loss, counted = self._processes.total(loss, count)
        return PassResult(loss / counted, round(counted), self._how.sampled_labels or 1)

    def _through_the_head(self, backward: bool) -> float:
        """Summed loss of the text's own labels in nats; with ``backward``, store gradients at the last block's outputs.

        Raises:
            NonFiniteError: If the loss is not finite.
        """
        how, loss = self._how, 0.0
        self._sweep.store.keep_within(much=True)
        head = self._model.get_output_embeddings()
        with frozen(self._model), reduced_weights(head, how.precision):
            hidden = in_turn([waiting.batch.hidden for waiting in self._waiting])
            for waiting, leaving in zip(self._waiting, hidden, strict=True):
                with arithmetic(self._device, how.precision):
                    loss += self._head_of_batch(waiting, leaving, backward)
                    if not math.isfinite(loss):
                        raise loss_not_finite(self._model, waiting.batch.input_ids, "the calibration tokens")
        return loss

    def _head_of_batch(self, waiting: _Waiting, hidden: Stored, backward: bool) -> float:
        labelled = waiting.labelled
        with torch.set_grad_enabled(backward):
            leaving = hidden.get().detach().requires_grad_(backward)
            states = self._sweep.last_states(waiting.batch, leaving)
        hidden.release()
        last = states.detach().index_select(0, labelled.positions)
        if not backward:
            return head_loss(self._model, last, labelled.labels)
        draws = label_draws(labelled, waiting.first, self._how)
        drawn = labelled.labels[None] if draws is None else sample_labels(self._model, last, draws)
        for number, labels in enumerate(drawn, start=1):
            by_last = torch.empty_like(last)
            loss = head_loss(self._model, last, labels, by_last)
            outer = torch.zeros_like(states).index_copy_(0, labelled.positions, by_last)
            (gradient,) = torch.autograd.grad(states, leaving, outer, retain_graph=number < len(drawn))
            waiting.gradients.append(self._sweep.store.put(gradient))
        return head_loss(self._model, last, labelled.labels) if self._how.sampled_labels else loss

    def _backward(self, block: int, entered: list[Stored], hooks: Hooks) -> None:
        with self._sweep.ready(block, then=block - 1):
            for waiting, hidden in zip(self._waiting, in_turn(entered), strict=True):
                hooks.positions, hooks.sample = waiting.batch.positions, waiting.sample
                # The gradient comes while the block is run.
                waiting.gradients[0].expect()
                with torch.enable_grad(), arithmetic(self._device, self._how.precision):
                    entering = hidden.get().detach().requires_grad_()
                    leaving = self._sweep.run(block, waiting.batch, entering)
                    waiting.gradients = [
                        self._handed_down(gradient, leaving, entering, last=gradient is waiting.gradients[-1])
                        for gradient in in_turn(waiting.gradients)
                    ]
                hidden.release()
                self._progress.advance(waiting.batch.input_ids.numel())

    def _handed_down(self, gradient: Stored, leaving: Tensor, entering: Tensor, last: bool) -> Stored:
        (below,) = torch.autograd.grad(leaving, entering, gradient.get(), retain_graph=not last)
        gradient.release()
        return self._sweep.store.put(below)


class Repeated:
    """Progress of tokens that are seen ``parts`` times, reported as if they were seen once.

    Args:
        advance: Function that is called with numbers of tokens.
        parts: Number of times that all tokens are seen.
    """

    def __init__(self, advance: Advance, parts: int = 1) -> None:
        self.parts = parts
        self._advance, self._seen, self._told = advance, 0, 0

    def advance(self, tokens: int) -> None:
        """Report that more tokens have gone through one of the parts."""
        self._seen += tokens
        more = self._seen // self.parts - self._told
        self._told += more
        self._advance(more)
