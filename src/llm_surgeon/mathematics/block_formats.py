"""Numbers of matrices that are stored in eight or four bits, with a scale for each block of them; pure functions.

Two formats are published as the only form of large checkpoints. In *FP8* (Micikevicius et al. 2022, "FP8 formats for
deep learning"; blocks as in the DeepSeek-V3 report, 2024) a number has eight bits, and a tile of 128 x 128, or the
whole matrix, one scale. In *MXFP4* (Open Compute Project 2023, "OCP Microscaling Formats (MX) Specification" 1.0) a
number has four bits: a sign and E2M1, one of 0, 1/2, 1, 3/2, 2, 3, 4, 6. Each 32 numbers of a row share a power of
two.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Absolute values of E2M1, by the three bits below the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Exponent of the scale of MXFP4 whose byte is 0.
_BIAS = -127
_NAN_SCALE = 255


def fp8_numbers(stored: Tensor, scales: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """Numbers of FP8 matrices, float32.

    Args:
        stored: ``[..., rows, columns]`` in a type of eight bits.
        scales: ``[..., tiles of rows, tiles of columns]``, or one number for all.
        block: Rows and columns of a tile; tiles at the end may be smaller. None divides the matrix evenly.

    Raises:
        ValueError: If there are not as many scales as tiles.
    """
    numbers, factors = stored.float(), _factors(scales)
    if factors.numel() == 1:
        return numbers * factors.reshape(())
    if factors.dim() != numbers.dim():
        raise ValueError(f"scales {[*scales.shape]} do not go with a matrix {[*stored.shape]}")
    for axis, size in ((-2, block and block[0]), (-1, block and block[1])):
        length, tiles = numbers.shape[axis], factors.shape[axis]
        size = size if size and -(-length // size) == tiles else length // tiles if length % tiles == 0 else None
        if size is None:
            raise ValueError(f"{tiles} scales do not divide {length} numbers")
        factors = factors.repeat_interleave(size, dim=axis).narrow(axis, 0, length)
    return numbers * factors


def _factors(scales: Tensor) -> Tensor:
    """Scales as float32; bytes are powers of two."""
    if scales.dtype == torch.uint8:
        return torch.exp2(scales.float() + _BIAS)
    return scales.float()


def mxfp4_numbers(stored: Tensor, scales: Tensor) -> Tensor:
    """Numbers of MXFP4 rows, float32, ``[..., blocks * 32]``.

    Args:
        stored: ``[..., blocks, 16]`` uint8, two numbers in a byte, the first in its lower half.
        scales: ``[..., blocks]`` uint8, the exponents of the blocks plus 127.

    Raises:
        ValueError: If there are not as many scales as blocks, or a scale is no number.
    """
    if stored.shape[:-1] != scales.shape or stored.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise ValueError(f"scales {[*scales.shape]} do not go with blocks {[*stored.shape]} of bytes")
    if bool((scales == _NAN_SCALE).any()):
        raise ValueError("a scale is no number")
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    numbers = torch.stack([values[(stored & 15).long()], values[(stored >> 4).long()]], dim=-1)
    return (numbers.flatten(-2) * _factors(scales)[..., None]).flatten(-2)
