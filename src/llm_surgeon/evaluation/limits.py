"""How much faster a smaller model could be at best: by its multiplications, and by the weights that it reads."""

from __future__ import annotations

from collections.abc import Mapping

from llm_surgeon.mathematics.structured_selection import KeepMask, count_weights
from llm_surgeon.models.anatomy import Anatomy


def speed_limits(anatomy: Anatomy, keep: Mapping[str, KeepMask], head_weights: int, prompt: int) -> tuple[float, float]:
    """Ratios, dense to pruned, that prefill and decoding cannot exceed unless something else shrinks as well.

    Prefill is limited by multiplications: each token meets every weight of the blocks once and, causally, half of the
    prompt in each query head, twice; the head sees the last token only. Decoding one sequence is limited by the
    weights read for each token, those of the head included.

    Args:
        anatomy: Layers of the model.
        keep: What is left of them.
        head_weights: Weights of the head.
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
