"""Scores of single weights for layer-wise pruning: pure functions, and the table ``SCORES`` that a new one joins.

Shapes: ``weight [R, C]``, output by input and without the bias; ``input_norm [C]`` is the L2 norm of each input over
the calibration tokens, ``output_norm [R]`` of each output. A weight of low score goes first.

Sources: Wanda (Sun et al., ICLR 2024); RI and RIA (Zhang et al., *Plug-and-Play*, ICLR 2024); the symmetric objective
``||X (W~ - W)||_F + ||(W~ - W) Y||_F`` with OWanda, SymWanda, the symmetric score, lp-RI and stochRIA (Yi and
Richtarik, *Symmetric Pruning of Large Language Models*, 2025).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics:
    """Statistics of a layer's calibration tokens that a score may use.

    Attributes:
        input_norm: L2 norm of each input over the tokens, ``[C]``.
        output_norm: L2 norm of each output, ``[R]``.
    """

    input_norm: Tensor
    output_norm: Tensor


@dataclass(frozen=True)
class ScoreOptions:
    """Constants of the scores that have any.

    Attributes:
        alpha: Exponent of the input norm in RIA and stochRIA.
        p: Order of the norm of rows and columns in lp-RI.
        ratio: Share of a row or column that stochRIA takes its norm of.
        activation: Whether stochRIA has RIA's factor of input norms.
        seed: Seed of stochRIA's draws.
    """

    alpha: float = 0.5
    p: float = 2.0
    ratio: float = 0.1
    activation: bool = True
    seed: int = 0


Score = Callable[[Tensor, Statistics, ScoreOptions], Tensor]


def magnitude(weight: Tensor) -> Tensor:
    """Magnitude ``|W|``, ``[R, C]``."""
    return weight.abs()


def wanda(weight: Tensor, input_norm: Tensor) -> Tensor:
    """Wanda, ``|W| ||x_c||``, ``[R, C]`` (Sun et al., 2024)."""
    return weight.abs() * input_norm


def owanda(weight: Tensor, output_norm: Tensor) -> Tensor:
    """OWanda, ``|W| ||y_r||``, ``[R, C]``: the output's half of the symmetric objective."""
    return weight.abs() * output_norm[:, None]


def symwanda(weight: Tensor, input_norm: Tensor, output_norm: Tensor) -> Tensor:
    """SymWanda, ``|W| (||x_c|| + ||y_r||)``, ``[R, C]``: both halves of the symmetric objective."""
    return weight.abs() * (input_norm + output_norm[:, None])


def symmetric(weight: Tensor) -> Tensor:
    """Symmetric score, ``|W| sqrt(||W_r:||^2 + ||W_:c||^2)``, ``[R, C]``: the objective with the weights as X and Y."""
    squares = weight.square()
    return weight.abs() * (squares.sum(1, keepdim=True) + squares.sum(0)).sqrt()


def relative_importance(weight: Tensor, p: float = 1.0) -> Tensor:
    """RI for p = 1 (Zhang et al., 2024), else lp-RI: ``|W| (1 / ||W_r:||_p + 1 / ||W_:c||_p)``, ``[R, C]``."""
    rows = torch.linalg.vector_norm(weight, p, dim=1, keepdim=True)
    columns = torch.linalg.vector_norm(weight, p, dim=0)
    return weight.abs() * (_reciprocal(rows) + _reciprocal(columns))


def ria(weight: Tensor, input_norm: Tensor, alpha: float = 0.5) -> Tensor:
    """RIA, ``RI ||x_c||^alpha``, ``[R, C]`` (Zhang et al., 2024)."""
    return relative_importance(weight) * input_norm**alpha


def stochastic_relative_importance(weight: Tensor, ratio: float, seed: int) -> Tensor:
    """RI with each norm taken over a random subset of its row or column, ``[R, C]``.

    Each row draws its own ``max(1, round(ratio C))`` columns and each column its own rows, without replacement.

    Args:
        weight: ``[R, C]``.
        ratio: Share drawn, above 0 and at most 1; 1 gives RI.
        seed: Seed of the draws, which are the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = _sampled_sums(weight.abs(), ratio, generator)[:, None]
    columns = _sampled_sums(weight.abs().T, ratio, generator)
    return weight.abs() * (_reciprocal(rows) + _reciprocal(columns))


def stochria(weight: Tensor, input_norm: Tensor | None, alpha: float, ratio: float, seed: int) -> Tensor:
    """StochRIA, ``stochRI ||x_c||^alpha``, ``[R, C]``; without ``input_norm`` no such factor, as in the paper."""
    scores = stochastic_relative_importance(weight, ratio, seed)
    return scores if input_norm is None else scores * input_norm**alpha


def _sampled_sums(values: Tensor, ratio: float, generator: torch.Generator) -> Tensor:
    """Sum over a random subset of each row of ``values [n, m]``: ``[n]``."""
    count = max(1, round(ratio * values.shape[1]))
    chosen = torch.rand(values.shape, generator=generator).topk(count, dim=1, sorted=False).indices
    return values.gather(1, chosen.to(values.device)).sum(1)


def _reciprocal(norms: Tensor) -> Tensor:
    """Reciprocal norms, 0 where a norm is 0: all weights it belongs to are 0 then, or none of them was drawn."""
    return torch.where(norms > 0, 1 / norms, 0)


SCORES: dict[str, Score] = {
    "magnitude": lambda weight, _statistics, _options: magnitude(weight),
    "wanda": lambda weight, statistics, _: wanda(weight, statistics.input_norm),
    "owanda": lambda weight, statistics, _: owanda(weight, statistics.output_norm),
    "symwanda": lambda weight, statistics, _: symwanda(weight, statistics.input_norm, statistics.output_norm),
    "symmetric": lambda weight, _statistics, _options: symmetric(weight),
    "ri": lambda weight, _statistics, _options: relative_importance(weight),
    "lp-ri": lambda weight, _, options: relative_importance(weight, options.p),
    "ria": lambda weight, statistics, options: ria(weight, statistics.input_norm, options.alpha),
    "stochria": lambda weight, statistics, options: stochria(
        weight, statistics.input_norm if options.activation else None, options.alpha, options.ratio, options.seed
    ),
}
