import pytest
import torch
from torch import nn

from llm_surgeon.passes.head import Head
from tiny import build


@pytest.mark.parametrize("bias", [False, True])
def test_sharpness_is_the_derivatives_of_the_loss_by_a_scale_of_the_states(bias):
    model = build("llama").double()
    generator = torch.Generator().manual_seed(0)
    if bias:
        width, vocabulary = model.config.hidden_size, model.config.vocab_size
        model.lm_head = nn.Linear(width, vocabulary).double()
    states = 30 * torch.randn(7, model.config.hidden_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(model.config.vocab_size, (7,), generator=generator)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = nn.functional.cross_entropy(model.lm_head(scale * states), labels, reduction="sum")
    (slope,) = torch.autograd.grad(loss, scale, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, scale)

    with torch.no_grad():
        found = Head(model).sharpness(states, labels)

    assert found == pytest.approx((slope.item(), curvature.item()), rel=1e-4)
    assert curvature.item() > 0.1
