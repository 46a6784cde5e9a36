"""Products ``x^T x`` in 8-bit fixed point with exact sums, for CPUs that multiply such numbers fastest.

A CPU with VNNI and without matrix units multiplies 8-bit integers much faster than float32 numbers (nine times on an
AMD EPYC), and adds the products up in 32-bit integers without any rounding. Each channel of ``x [tokens, size]`` is
rounded to 255 steps between its largest values; the product of what was rounded is a Gram matrix, so it is positive
semi-definite like the exact one. If ``s`` is a channel's step, rounding adds about ``s^2 / 12`` to the mean square of
the channel, independently of the other channels.

A few tokens with very large values (the first of a text, mostly) would make the steps too coarse for all others. A sum
over tokens can be taken in two parts, so these tokens are left to float32 products. In the rest no value is above
``LARGE`` times its channel's mean magnitude ``m``, so that ``s^2 / 12 <= (LARGE m / 127)^2 / 12``, at most 2 % of the
mean square, where the damping of a factor adds at least 1 % of the mean of all channels. docs/scale.md says how far
costs differ from those of exact sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Values of so many times the mean magnitude of their channel are large.
LARGE = 64.0
_STEPS = 127
# Tokens that are rounded at once.
_AT_ONCE = 512


@dataclass(frozen=True)
class FixedPoint:
    """A matrix ``x [tokens, size]`` in fixed point, in two parts over its tokens.

    Attributes:
        numbers: ``[tokens, size]`` int8, numbers of steps; zero for the tokens in ``left``.
        step: ``[size]``, step of each channel; not finite if the channel is not, so that no product with it is either.
        left: ``[some, size]`` float32, the tokens with large values, not rounded.
    """

    numbers: Tensor
    step: Tensor
    left: Tensor


def is_fast(device: torch.device) -> bool:
    """Tell whether a device multiplies 8-bit integers much faster than float32 numbers, and torch lets it.

    CPUs with matrix units do not count: these multiply bfloat16 numbers fast and add them up in float32, without steps.
    """
    asked = all(hasattr(torch.cpu, name) for name in ("_is_vnni_supported", "_is_amx_tile_supported"))
    if device.type != "cpu" or not (asked and hasattr(torch, "_int_mm") and torch.backends.mkldnn.is_available()):
        return False
    return torch.cpu._is_vnni_supported() and not torch.cpu._is_amx_tile_supported()


def rounded(x: Tensor) -> FixedPoint:
    """Round ``x [tokens, size]``, of any floating type, to steps of its channels."""
    # In the type of x: half as many bytes to go through where that is bfloat16.
    magnitude = x.abs()
    # A channel of zeros is at no multiple of its mean.
    mean = magnitude.mean(0, dtype=torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    largest = magnitude.amax(0)
    tokens = _large(magnitude, mean, largest)
    if len(tokens):
        largest = magnitude.index_fill_(0, tokens, 0.0).amax(0)
    step = largest.float() / _STEPS
    # Zeros instead of fewer rows: a matrix library compiles a kernel for each shape of a product.
    numbers = _in_steps(x, torch.where(step > 0, 1 / step, 0.0)).index_fill_(0, tokens, 0)
    return FixedPoint(numbers, step, x[tokens].float())


def _large(magnitude: Tensor, mean: Tensor, largest: Tensor) -> Tensor:
    """Positions of the tokens of ``magnitude [tokens, size]`` with a large value, ascending; mostly none or few."""
    # Counted first: a plan, which has no numbers, takes any count for zero.
    if not int((largest / mean > LARGE).sum()):
        return torch.empty(0, dtype=torch.int64, device=magnitude.device)
    # Float16 could not hold the inverse of a small mean.
    kind = magnitude.dtype if magnitude.dtype == torch.bfloat16 else torch.float32
    times = (magnitude * (1 / mean).to(kind)).amax(1)
    return times.topk(int((times > LARGE).sum())).indices.sort().values


def _in_steps(x: Tensor, steps_per_one: Tensor) -> Tensor:
    """Number of steps of each element of ``x [tokens, size]``, int8 of the same shape."""
    numbers = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    # A part at a time stays in the cache.
    for part, own in zip(x.split(_AT_ONCE), numbers.split(_AT_ONCE), strict=True):
        own.copy_((part * steps_per_one).round_())
    return numbers


def add_product(total: Tensor, x: FixedPoint, rows: slice, columns: slice) -> None:
    """Add the rounded tokens' part of ``x_rows^T x_columns`` to ``total [r, c]`` float32, in place."""
    product = torch._int_mm(x.numbers[:, rows].T, x.numbers[:, columns]).float()
    total.addcmul_(product.mul_(x.step[columns]), x.step[rows, None])
