"""Random numbers for tokens, independent of batches and processes, and samples of tokens that are drawn by them."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from llm_surgeon.stopwatch import timed


def draws_of(shape: Sequence[int], first: int, numbers: int, seed: int | str) -> Tensor:
    """Draw numbers in [0, 1) for the tokens of a batch: ``[batch * length, numbers]``.

    Each sequence has a seed of its own, so that its numbers depend neither on the batch nor on the process it is in.

    Args:
        shape: Sequences of the batch, and their length.
        first: Number of its first sequence among those of all processes.
        numbers: Count of numbers for each token.
        seed: Seed of the numbers.
    """
    sequences, length = shape
    seeds = (random.Random(f"{seed} {first + row}").getrandbits(32) for row in range(sequences))
    generators = (torch.Generator().manual_seed(own) for own in seeds)
    return torch.cat([torch.rand(length, numbers, generator=generator) for generator in generators])


class TokenSample:
    """Sample of tokens of each sequence, weighted so that sums of outer products stay the same on average.

    *Priority sampling* (Duffield, Lund and Thorup 2007, "Priority sampling for estimation of arbitrary subset sums"):
    of rows ``x_t`` with weights ``w_t = |x_t|^2`` and numbers ``u_t`` uniform in (0, 1], the ``k`` of largest priority
    ``w_t / u_t`` are taken, and each stands for a row of weight ``max(w_t, tau)``, where ``tau`` is the largest
    priority that was not taken. The expectation of what a row stands for is ``w_t``, so that of the sum of outer
    products is that of all rows. Rows of more weight than ``tau`` are always taken, as they are: where few rows have
    most of the weight, as those of gradients do, little is left to chance.

    Args:
        shape: Sequences of the batch, and their length.
        positions: Flat positions of the tokens that count, ``[n]``; at least one position of each sequence does not.
        share: Share of the tokens of a sequence, below 1; rounded up.
        first: Number of the first sequence among those of all processes.
        seed: Seed of the numbers.
    """

    def __init__(self, shape: Sequence[int], positions: Tensor, share: float, first: int, seed: int) -> None:
        sequences, length = shape
        self._count = min(math.ceil(share * length), length - 1)
        drawn = 1 - draws_of(shape, first, 1, f"{seed} sample").to(positions.device).flatten()
        # Tokens that do not count get no priority.
        chances = torch.full_like(drawn, torch.inf).index_copy_(0, positions, drawn[positions])
        self._chances = chances.view(sequences, length)

    def take(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Sample rows of ``x [..., size]``: ``[taken, size]`` float32.

        Args:
            x: A row for each token, or for each of ``tokens``. Tokens without a row stand for nothing.
            tokens: Flat positions of the tokens that ``x`` has rows of; None if it has rows of all.
        """
        if tokens is not None:
            x = x.new_zeros(self._chances.numel(), x.shape[-1]).index_copy_(0, tokens, x)
        with timed("factor sums"):
            rows = x.reshape(*self._chances.shape, x.shape[-1])
            weight = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).square_()
            priority, taken = (weight / self._chances).topk(self._count + 1)
            tau, priority, taken = priority[:, -1:], priority[:, :-1], taken[:, :-1]
            weight = weight.gather(1, taken)
            # A row of zeros stands for nothing, and so does a token that does not count.
            scale = torch.where(priority == 0, 0.0, (weight.maximum(tau) / weight).sqrt_())
            flat = (taken + torch.arange(len(rows), device=x.device)[:, None] * rows.shape[1]).flatten()
            return rows.flatten(0, 1).index_select(0, flat).float().mul_(scale.view(-1, 1))
