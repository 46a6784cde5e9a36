import pytest
import torch

from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.evaluation.divergence import kl_divergence, perplexity_and_divergence, reference_states
from llm_surgeon.evaluation.perplexity import perplexity
from tiny import BUILDERS, build, tokens


def text(stride=16, precision="float32"):
    return EvaluationText(tokens(1, 70, seed=3)[0], "words", 16, stride, precision)


def damaged(family="llama", scale=0.05):
    """The model of ``build`` with noise on the layers that pruning changes."""
    model, generator = build(family), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(kind in name for kind in ("proj", "fc", "mlp", "attention")):
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


def by_definition(dense, pruned, ids):
    """Sum over the vocabulary in float64, of whole sequences of logits."""
    expected, actual = (model(ids).logits[0].double().log_softmax(-1) for model in (dense, pruned))
    return (expected.exp() * (expected - actual)).sum(-1)


@pytest.mark.parametrize("family", BUILDERS)
@torch.no_grad()
def test_equals_the_definition_in_float64(family, monkeypatch):
    monkeypatch.setattr("llm_surgeon.passes.head.CHUNK", 5)
    dense, pruned, sample = build(family), damaged(family), text()
    _, states = reference_states(dense, sample)
    measured, divergence = perplexity_and_divergence(pruned, sample, states)
    windows = [sample.tokens[start : start + 16][None] for start in range(0, 64, 16)]
    expected = torch.cat([by_definition(dense, pruned, ids)[:-1] for ids in windows]).mean()
    assert divergence == pytest.approx(float(expected), rel=1e-4)
    assert divergence > 1e-3
    assert measured == perplexity(pruned, sample)


@torch.no_grad()
def test_overlapping_windows_count_each_token_once():
    dense, pruned, sample = build("llama"), damaged(), text(stride=8)
    _, states = reference_states(dense, sample)
    expected = [
        by_definition(dense, pruned, sample.tokens[start : start + 16][None])[first - 1 : -1]
        for start, first in sample.windows
    ]
    assert [len(part) for part in expected] == [15] + [8] * 6
    _, divergence = perplexity_and_divergence(pruned, sample, states)
    assert divergence == pytest.approx(float(torch.cat(expected).mean()), rel=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_does_not_diverge_from_itself(precision):
    model, sample = build("llama"), text(precision=precision)
    reference, states = reference_states(model, sample)
    measured, divergence = perplexity_and_divergence(model, sample, states)
    assert divergence == 0.0
    assert measured == reference == perplexity(model, sample)


def test_is_not_symmetric_and_has_the_dense_model_first():
    """What the dense model deems certain and the other unlikely counts; the other way round hardly."""
    certain, uniform = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert kl_divergence(torch.nn.Identity(), torch.nn.Identity(), certain, uniform) == pytest.approx(0.6931, abs=1e-4)
    assert kl_divergence(torch.nn.Identity(), torch.nn.Identity(), uniform, certain) == pytest.approx(9.3069, abs=1e-4)


def test_rounding_never_makes_it_negative():
    generator = torch.Generator().manual_seed(0)
    dense = 10 * torch.randn(500, 3000, generator=generator)
    nearly = dense + 1e-6 * torch.randn(dense.shape, generator=generator)
    assert 0.0 <= kl_divergence(torch.nn.Identity(), torch.nn.Identity(), dense, nearly) < 1e-3


def test_a_reference_of_another_text_is_refused():
    model, sample = build("llama"), text()
    _, states = reference_states(model, sample)
    with pytest.raises(ValueError, match="59 positions, the text 60"):
        perplexity_and_divergence(model, sample, states[1:])
