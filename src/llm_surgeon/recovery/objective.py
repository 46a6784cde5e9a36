"""The loss of a recovery: a student's divergence from its teacher, and the likelihood of the text.

Teacher and student are modules with one forward pass each, as sharded weights are together only within one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from llm_surgeon.mathematics.distillation import Outcomes, divergence, likeliest
from llm_surgeon.passes.head import Head, label_positions, last_states

# Numbers of the logits that are made at once. Each is held some four times.
_LOGITS = 2**24


@dataclass(frozen=True)
class Objective:
    """What a student learns.

    Attributes:
        temperature: Temperature of both models' predictions.
        top_k: The teacher's likeliest tokens, the others are together as one; None for all apart.
        label_weight: Share of the text's next tokens in the loss; the rest is the divergence from the teacher.
    """

    temperature: float = 1.0
    top_k: int | None = 128
    label_weight: float = 0.0


class Teacher(nn.Module):
    """The dense model, which predicts and does not change.

    Args:
        model: The dense model.
        objective: What is to be told of its predictions.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model, self._objective = model.eval().requires_grad_(False), objective

    @torch.no_grad()
    def forward(self, input_ids: Tensor) -> Outcomes:
        """Predictions at the positions of ``input_ids [batch, length]`` that have a next token."""
        positions, _ = label_positions(input_ids, None)
        states = last_states(self.model, input_ids, None)[positions]
        head, how = Head(self.model), self._objective
        parts = [likeliest(head(some), how.top_k, how.temperature) for some in states.split(_rows(self.model))]
        return Outcomes(
            torch.cat([part.logs for part in parts]),
            _joined([part.tokens for part in parts]),
            _joined([part.rest for part in parts]),
        )


class Student(nn.Module):
    """The pruned model, which learns.

    Args:
        model: The pruned model, in evaluation mode: without dropout, two runs are the same.
        objective: What it learns.
    """

    def __init__(self, model: PreTrainedModel, objective: Objective) -> None:
        super().__init__()
        self.model, self._objective = model.eval(), objective

    def forward(self, input_ids: Tensor, teacher: Outcomes | None = None) -> Tensor:
        """Sum of the loss over the positions of ``input_ids [batch, length]`` that have a next token, in nats.

        The logits of a few positions are made at a time, and once more in the backward pass: those of all would need
        more memory than the model.
        """
        positions, labels = label_positions(input_ids, None)
        states = last_states(self.model, input_ids, None)[positions]
        total, rows = states.new_zeros((), dtype=torch.float32), _rows(self.model)
        for start in range(0, len(states), rows):
            part = slice(start, start + rows)
            told = None if teacher is None else teacher.at(part)
            total = total + checkpoint(self._loss, states[part], labels[part], told, use_reentrant=False)
        return total

    def _loss(self, states: Tensor, labels: Tensor, teacher: Outcomes | None) -> Tensor:
        logits, how = Head(self.model)(states), self._objective
        share = how.label_weight if teacher is not None else 1.0
        total = logits.new_zeros(())
        if share:
            total = total + share * nn.functional.cross_entropy(logits, labels, reduction="sum")
        if teacher is not None and share < 1:
            total = total + (1 - share) * divergence(logits, teacher, how.temperature)
        return total


def _rows(model: PreTrainedModel) -> int:
    return max(1, _LOGITS // int(model.get_output_embeddings().weight.shape[0]))


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None
