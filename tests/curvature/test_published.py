"""A and G against a published curvature library, written by others."""

import pytest
import torch
from torch import nn

from llm_surgeon.curvature import Estimation, estimate
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models import examine, family_of
from llm_surgeon.session.session import Session
from tiny import build, tokens

curvlinops = pytest.importorskip("curvlinops", reason="the oracle packages of requirements-oracle.txt are missing")


class Logits(nn.Module):
    """The library wants a module from tokens to ``[batch, classes, position]``."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids).logits.transpose(1, 2)


@pytest.mark.parametrize("family", ["llama", "llama-biased", "opt"])
def test_factors_equal_those_of_curvlinops(family):
    """Both factors of every layer, and one constant between the two conventions of scale for all of them."""
    model, ids = build(family), tokens(6, 9)
    anatomy = examine(model, family_of(model.config.model_type))
    keep = anatomy.dense_masks()
    session = Session(model, anatomy, CalibrationTokens(ids, None, {}))
    ours = estimate(session, keep, Estimation(batch_size=2, precision="float32"))
    wrapped = Logits(model)
    parameters = []
    for name in anatomy.layers:
        parameters += list(model.get_submodule(name).parameters())
    theirs = curvlinops.KFACLinearOperator(
        wrapped,
        nn.CrossEntropyLoss(reduction="sum"),
        parameters,
        # The last position has no label and, the model being causal, no influence: they leave it out beforehand.
        [(ids[:, :-1], ids[:, 1:])],
        fisher_type="empirical",
        kfac_approx="expand",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    theirs.compute_kronecker_factors()
    scales: dict[bool, list[float]] = {}
    for name, layer in anatomy.layers.items():
        a, g = ours.input_factor(layer, keep[name]), ours.gradient_factor(layer)
        their_a, their_g = theirs._input_covariances[f"model.{name}"], theirs._gradient_covariances[f"model.{name}"]
        torch.testing.assert_close(a / a.trace(), their_a / their_a.trace(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(g / g.trace(), their_g / their_g.trace(), rtol=1e-3, atol=1e-6)
        # OPT flattens batch and sequence before fc1; the library then counts other terms in its normalisation.
        flattened = layer.kind.startswith("fc")
        scales.setdefault(flattened, []).append(float(a.trace() * g.trace() / (their_a.trace() * their_g.trace())))
    for same in scales.values():
        assert max(same) == pytest.approx(min(same), rel=1e-3)
