import pytest
import torch

from llm_surgeon.evaluation.masks import mask_equivalence


def masks(*rows):
    return {str(number): torch.tensor([row]).bool() for number, row in enumerate(rows)}


def test_equivalence_is_the_common_share_of_what_was_removed():
    first = masks([1, 1, 0, 0], [1, 0])
    assert mask_equivalence(first, first) == 1.0
    assert mask_equivalence(first, masks([0, 0, 1, 1], [0, 1])) == 0.0
    assert mask_equivalence(first, masks([1, 0, 1, 0], [1, 0])) == pytest.approx(2 / 3)
    assert mask_equivalence(masks([0, 0]), masks([0, 0])) == 1.0


def test_independent_masks_agree_by_chance():
    generator = torch.Generator().manual_seed(0)
    first, second = ({"w": torch.rand(300, 300, generator=generator) < 0.3} for _ in range(2))
    assert mask_equivalence(first, second) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("other", [masks([1, 0, 0]), {"else": torch.tensor([[True, False]])}])
def test_other_layers_are_an_error(other):
    with pytest.raises(ValueError, match="same layers"):
        mask_equivalence(masks([1, 0]), other)
