import copy

import pytest
import torch
from torch import nn

from llm_surgeon.models.modeling_pruned import PrunedLinear, empty_linear, shrink_linears


def pruned_and_masked(bias, kept_in, kept_out, seed=0):
    """A pruned layer of 6 inputs and 5 outputs, and a dense one with zeros in the same places."""
    torch.manual_seed(seed)
    dense = nn.Linear(6, 5, bias=bias)
    columns, rows = torch.randperm(6)[:kept_in].sort().values, torch.randperm(5)[:kept_out].sort().values
    small = PrunedLinear(6, 5, kept_in, kept_out, bias)
    with torch.no_grad():
        small.input_index.copy_(columns)
        small.output_index.copy_(rows)
        small.core.weight.copy_(dense.weight[rows][:, columns])
        masked = nn.Linear(6, 5, bias=bias)
        masked.weight.zero_()
        masked.weight[rows[:, None], columns] = dense.weight[rows[:, None], columns]
        if bias:
            small.core.bias.copy_(dense.bias[rows])
            masked.bias.zero_()
            masked.bias[rows] = dense.bias[rows]
    return small, masked


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("kept_in", "kept_out"), [(4, 3), (6, 5), (1, 1), (0, 3), (4, 0), (0, 0)])
def test_equals_the_dense_layer_with_zeros(bias, kept_in, kept_out):
    small, masked = pruned_and_masked(bias, kept_in, kept_out)
    x = torch.randn(2, 3, 6, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.testing.assert_close(small(x), masked(y))
    small(x).square().sum().backward()
    masked(y).square().sum().backward()
    torch.testing.assert_close(x.grad if x.grad is not None else torch.zeros_like(x), y.grad)


def test_nothing_is_stored_for_what_is_gone():
    small, _ = pruned_and_masked(True, 4, 3)
    assert sum(p.numel() for p in small.parameters()) == 4 * 3 + 3


def test_state_is_saved_and_loaded_with_its_indices():
    small, masked = pruned_and_masked(True, 4, 3)
    other = PrunedLinear(6, 5, 4, 3, True)
    other.load_state_dict(copy.deepcopy(small.state_dict()))
    x = torch.randn(2, 6)
    torch.testing.assert_close(other(x), masked(x))


def test_an_empty_layer_draws_no_random_numbers():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    layer = empty_linear(3, 4, True, torch.device("cpu"), torch.bfloat16)
    assert torch.equal(torch.rand(1), expected)
    assert layer.weight.shape == (4, 3)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.extra_repr() == "in_features=3, out_features=4, bias=True"


def test_shrinking_keeps_type_mode_and_gradient_flags():
    model = nn.Sequential(nn.Linear(6, 5).requires_grad_(False).to(torch.float64), nn.ReLU()).eval()
    shrink_linears(model, {"0": {"in_features": 6, "out_features": 5, "kept_in": 4, "kept_out": None}})
    assert isinstance(model[0], PrunedLinear)
    assert model[0].core.weight.dtype == torch.float64
    assert not model[0].training
    assert not any(p.requires_grad for p in model.parameters())
    assert model[0].output_index is None


def test_a_change_of_type_leaves_the_indices_alone():
    small, masked = pruned_and_masked(False, 4, 3)
    assert small.to(torch.bfloat16).input_index.dtype == torch.int64
    x = torch.randn(2, 6).bfloat16()
    torch.testing.assert_close(small(x).float(), masked(x.float()), rtol=0.05, atol=0.05)
