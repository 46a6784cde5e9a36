import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from llm_surgeon.mathematics.block_formats import fp8_numbers, mxfp4_numbers

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape):
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    ("shape", "block"), [((6, 8), (3, 4)), ((7, 10), (3, 4)), ((2, 7, 10), (3, 4)), ((5, 4), None)]
)
def test_each_number_of_a_tile_has_its_scale(kind, shape, block):
    stored = drawn(*shape).to(kind)
    height, width = block or (1, 2)
    scales = drawn(*shape[:-2], -(-shape[-2] // height), -(-shape[-1] // width)).abs()

    found = fp8_numbers(stored, scales, block)

    for place in torch.cartesian_prod(*(torch.arange(size) for size in shape)).tolist():
        *before, row, column = place
        scale = scales[(*before, row // height, column // width)]
        assert found[tuple(place)] == stored[tuple(place)].float() * scale


def test_one_scale_may_be_for_all():
    stored = drawn(3, 5).to(torch.float8_e4m3fn)
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.full((1, 1), 0.5)):
        assert torch.equal(fp8_numbers(stored, scale), stored.float() / 2)


def test_scales_of_eight_bits_are_powers_of_two():
    stored = torch.ones(1, 2).to(torch.float8_e4m3fn)
    scales = torch.tensor([[127, 130]], dtype=torch.uint8)
    assert fp8_numbers(stored, scales).tolist() == [[1.0, 8.0]]
    assert fp8_numbers(stored, scales.view(torch.float8_e8m0fnu)).tolist() == [[1.0, 8.0]]


def test_other_numbers_of_scales_are_refused():
    stored = drawn(6, 8).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="4 scales do not divide 6 numbers"):
        fp8_numbers(stored, drawn(4, 2), (3, 4))
    with pytest.raises(ValueError, match="do not go with a matrix"):
        fp8_numbers(stored, drawn(2), (3, 4))


def test_fp8_is_what_transformers_makes_of_it():
    stored, scales = drawn(256, 384).to(torch.float8_e4m3fn), drawn(2, 3).abs()
    expected = Fp8Dequantize(None)._dequantize_one(stored, scales, torch.float32)
    assert torch.equal(fp8_numbers(stored, scales, (128, 128)), expected)


def test_all_sixteen_numbers_of_mxfp4():
    """The lower half of a byte comes first; bit 3 is the sign. Of the standard's table."""
    stored = torch.tensor([[low | (low + 8) << 4 for low in range(8)] * 2], dtype=torch.uint8)
    (found,) = mxfp4_numbers(stored[None], torch.tensor([[128]], dtype=torch.uint8))
    expected = [sign * 2 * value for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6) for sign in (1, -1)]
    assert found.tolist() == expected * 2


def test_mxfp4_is_what_transformers_makes_of_it():
    stored = torch.randint(256, (2, 6, 3, 16), generator=GENERATOR, dtype=torch.uint8)
    scales = torch.randint(120, 134, (2, 6, 3), generator=GENERATOR, dtype=torch.uint8)
    expected = convert_moe_packed_tensors(stored, scales, dtype=torch.float32)
    assert torch.equal(mxfp4_numbers(stored, scales).transpose(-2, -1), expected)


def test_what_is_no_mxfp4_is_refused():
    stored = torch.zeros(2, 3, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="do not go with blocks"):
        mxfp4_numbers(stored, torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no number"):
        mxfp4_numbers(stored, torch.full((2, 3), 255, dtype=torch.uint8))
