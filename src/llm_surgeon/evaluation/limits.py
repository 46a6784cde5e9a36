"""Upper limits of the speed-up of a smaller model, from its multiplications and from the weights that it reads."""

from __future__ import annotations

from collections.abc import Mapping

from llm_surgeon.mathematics.keep_masks import KeepMask, count_weights
from llm_surgeon.models.anatomy import Anatomy


def speed_limits(anatomy: Anatomy, keep: Mapping[str, KeepMask], head_weights: int, prompt: int) -> tuple[float, float]:
    """Speed-ups of prefill and decoding over the dense model that cannot be exceeded unless something else shrinks.

    Prefill is limited by multiplications: each token meets every weight of the blocks once and, causally, half of the
    prompt in each query head, twice; the head sees the last token only. Decoding one sequence is limited by the
    weights read for each token, those of the head included.

    Args:
        anatomy: Layers of the model.
        keep: Rows and columns that are left of them.
        head_weights: Number of weights of the head.
        prompt: Tokens of the prefill.

    Returns:
        The limits of prefill and of decoding.
    """
    dense = anatomy.dense_masks()
    prefill = _multiplications(anatomy, dense, head_weights, prompt) / _multiplications(
        anatomy, keep, head_weights, prompt
    )
    return prefill, (count_weights(dense) + head_weights) / (count_weights(keep) + head_weights)


def _multiplications(anatomy: Anatomy, keep: Mapping[str, KeepMask], head_weights: int, prompt: int) -> int:
    pairs = sum(part.products(keep) for part in anatomy.parts)
    return prompt * count_weights(keep) + prompt * prompt * pairs + head_weights
