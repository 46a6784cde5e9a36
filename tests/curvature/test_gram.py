import pytest
import torch

from llm_surgeon.curvature import gram
from llm_surgeon.curvature.gram import GramSum, reserve


@pytest.mark.parametrize("size", [0, 1, 3, 5, 6, 17])
def test_sum_equals_the_dense_product_whatever_the_strips(size, monkeypatch):
    monkeypatch.setattr(gram, "STRIP", 5)
    monkeypatch.setattr(gram, "MULTIPLE", 3)
    generator = torch.Generator().manual_seed(size)
    parts = [torch.randn(n, size, generator=generator) for n in (3, 1, 8)]
    total = GramSum(size, "cpu")
    for part in parts:
        total.add(part)
    x = torch.cat(parts).double()
    torch.testing.assert_close(total.dense().double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert torch.equal(total.dense(), total.dense().T)


def test_sums_are_float32_for_bfloat16_inputs():
    """Summing ones in bfloat16 would stop at 256."""
    total = GramSum(2, "cpu")
    for _ in range(4):
        total.add(torch.ones(200, 2, dtype=torch.bfloat16))
    assert torch.equal(total.dense(), torch.full((2, 2), 800.0))


def test_half_of_the_matrix_is_stored(monkeypatch):
    monkeypatch.setattr(gram, "STRIP", 8)
    assert GramSum(64, "cpu").nbytes == 4 * 8 * sum(range(8, 65, 8))


def test_sums_in_one_piece_of_memory_are_what_they_are_apart():
    generator = torch.Generator().manual_seed(0)
    sizes = (0, 3, 200, 64)
    apart, together = [[GramSum(size, "cpu") for size in sizes] for _ in range(2)]
    reserve(together, "cpu")
    memory = {strip.untyped_storage().data_ptr() for total in together for strip in total._strips}
    assert len(memory) == 1
    for _ in range(2):
        for alone, one in zip(apart, together, strict=True):
            x = torch.randn(10, alone.size, generator=generator)
            alone.add(x)
            one.add(x)
    for alone, one in zip(apart, together, strict=True):
        assert torch.equal(alone.dense(), one.dense())


def test_rounding_of_the_sums_grows_with_the_root_of_the_batches():
    """Of columns of very different size; a damping is a hundredth, and the bound a five-thousandth of that."""
    generator = torch.Generator().manual_seed(0)
    total, exact = GramSum(16, "cpu"), torch.zeros(16, 16, dtype=torch.float64)
    mixture, scale = torch.randn(16, 16, generator=generator), torch.logspace(-4, 4, 16)
    for _ in range(400):
        part = (torch.randn(64, 16, generator=generator) @ mixture + 0.5) * scale
        total.add(part)
        exact += part.double().T @ part.double()
    norm = exact.diagonal().sqrt()
    error = (total.dense().double() - exact) / (norm[:, None] * norm)
    assert float(torch.linalg.eigvalsh(error).abs().max()) < 2e-6
