import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_surgeon.models import attention
from llm_surgeon.models.attention import CausalAttention, attention_by_blocks
from llm_surgeon.models.modes import arithmetic, fast_pass
from tiny import build


def inputs(length, heads, key_heads, width, value_width, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, width), (key_heads, width), (key_heads, value_width)
    return [
        torch.randn(2, count, length, size, generator=generator).to(dtype).requires_grad_() for count, size in shapes
    ]


def dense_attention(query, key, value, scale):
    query, key, value = (x.double() for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)


@pytest.fixture(params=[0, 512], ids=["computed once more", "kept"])
def kept(request, monkeypatch):
    """Length up to which probabilities are kept for the way back."""
    monkeypatch.setattr(attention, "_KEPT", request.param)
    return request.param


@pytest.mark.parametrize("length", [1, 7, 128, 300])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
def test_equals_dense_attention_forward_and_backward(length, heads, key_heads, kept):
    tensors = inputs(length, heads, key_heads, 8, 5, torch.float64)
    outer = torch.randn(2, heads, length, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual, expected = CausalAttention.apply(*tensors, 0.3), dense_attention(*tensors, 0.3)
    torch.testing.assert_close(actual, expected)
    # Sums over blocks are float32.
    for ours, theirs in zip(
        torch.autograd.grad(actual, tensors, outer), torch.autograd.grad(expected, tensors, outer), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_accurate_to_its_rounding(kept):
    tensors = inputs(256, 4, 2, 32, 32, torch.bfloat16)
    outer = torch.randn(2, 4, 256, 32, generator=torch.Generator().manual_seed(1))
    wide = [x.detach().double().requires_grad_() for x in tensors]
    truth = torch.autograd.grad(dense_attention(*wide, 32**-0.5), wide, outer.double())
    actual = torch.autograd.grad(CausalAttention.apply(*tensors, 32**-0.5), tensors, outer.bfloat16())
    for ours, theirs in zip(actual, truth, strict=True):
        # Numbers in bfloat16 are up to 0.004 off; here products of some of them are summed.
        assert float((ours.double() - theirs).norm() / theirs.norm()) < 0.01


def test_probabilities_of_long_sequences_are_not_kept():
    for length, tensors_kept in ((512, 4 + 4), (513, 4)):
        output = CausalAttention.apply(*inputs(length, 2, 1, 8, 8, torch.bfloat16), 0.3)
        assert len(output.grad_fn.saved_tensors) == tensors_kept


def count_calls(monkeypatch):
    calls = []
    apply = CausalAttention.apply
    monkeypatch.setattr(attention.CausalAttention, "apply", lambda *x: calls.append(1) or apply(*x))
    return calls


@pytest.mark.parametrize("family", ["llama", "opt", "qwen2", "gpt2", "gpt-neox", "phi3"])
def test_stands_in_for_the_fused_attention_of_whole_models(family, monkeypatch):
    model = build(family)
    ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    calls = count_calls(monkeypatch)
    with torch.no_grad(), fast_pass(model, "bfloat16"), arithmetic(torch.device("cpu"), "bfloat16"):
        ours = model(ids).logits
    assert len(calls) == model.config.num_hidden_layers
    with torch.no_grad():
        exact = model(ids).logits
    assert len(calls) == model.config.num_hidden_layers
    assert float((ours - exact).norm() / exact.norm()) < 0.03


def test_padding_and_full_precision_are_left_to_the_fused_attention(monkeypatch):
    model = build("llama")
    ids = torch.randint(0, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    calls = count_calls(monkeypatch)
    with torch.no_grad(), attention_by_blocks():
        model(ids)
        with arithmetic(torch.device("cpu"), "bfloat16"):
            model(ids, attention_mask=mask)
    assert not calls


def test_the_fused_attention_is_back_afterwards_also_after_an_error():
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def fail():
        with attention_by_blocks():
            with attention_by_blocks():
                pass
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not before
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
