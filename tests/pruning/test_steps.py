"""Several steps of a shot from one curvature."""

import pytest
import torch

from llm_surgeon import PruneConfig
from llm_surgeon.curvature import Estimation, estimate
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.fisher import Damping
from llm_surgeon.mathematics.keep_masks import KeepMask, count_weights
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import read_matrix
from llm_surgeon.pruning import shots
from llm_surgeon.session.session import Session
from tiny import build, tokens

TEXT = CalibrationTokens(tokens(8, 16), None, {})
HOW = Estimation(batch_size=4, precision="float32")
families = pytest.mark.parametrize("family", ["llama", "llama-biased", "gpt2", "gpt-neox"])


def examined(family):
    model = build(family)
    return model, examine(model, family_of(model.config.model_type))


def recipe(**options):
    common = {
        "preset": "none",
        "samples": 8,
        "seq_len": 16,
        "precision": "float32",
        "dampening_g": 0.5,
        "shots": 1,
        "sparsity": 0.3,
    }
    return PruneConfig.from_mapping({**common, **options})


@families
def test_factors_of_what_is_left_are_blocks(family):
    """Costs of half the rows and columns are those of the halves of the factors, the bias staying last."""
    model, anatomy = examined(family)
    whole = anatomy.dense_masks()
    curvature = estimate(Session(model, anatomy, TEXT), whole, HOW)
    for name, layer in anatomy.layers.items():
        keep = KeepMask(torch.arange(layer.rows) % 2 == 0, torch.arange(layer.columns) % 3 > 0)
        columns = torch.cat([keep.columns, torch.ones(int(layer.bias), dtype=torch.bool)])
        weight = read_matrix(model, layer)[keep.rows][:, columns]
        g, a = curvature.gradient_factor(layer), curvature.input_factor(layer, whole[name])
        fisher = curvature.fisher(layer, keep, Damping(1e-2, 1e-1))
        g, a = g[keep.rows][:, keep.rows], a[columns][:, columns]
        inverse = torch.linalg.inv(g.double() + 0.1 * g.diagonal().mean() * torch.eye(len(g)))
        expected = (weight @ a * weight).sum(1) / (2 * inverse.diagonal())
        torch.testing.assert_close(fisher.row_costs(weight, correlated=True).double(), expected, rtol=1e-3, atol=1e-9)


@families
@pytest.mark.parametrize("structure", ["rows-columns", "neurons+heads"])
def test_a_shot_in_steps_reaches_its_target_with_one_curvature(family, structure, monkeypatch):
    model, anatomy = examined(family)
    passes, sizes = [], []
    original, update = shots.estimate, shots._Shots._update
    monkeypatch.setattr(shots, "estimate", lambda *a, **k: passes.append(1) or original(*a, **k))
    monkeypatch.setattr(
        shots._Shots,
        "_update",
        lambda run, c, s, *more: sizes.append(count_weights(s.keep)) or update(run, c, s, *more),
    )
    options = {
        "structure": structure,
        "steps_per_shot": 3,
        "shots": 2,
        "round_to": 1 if "neurons" in structure else None,
    }
    *_, last = shots.run_shots(Session(model, anatomy, TEXT, recipe(**options)))
    assert len(passes) == 2
    assert len(sizes) == 6
    assert sizes == sorted(sizes, reverse=True)
    assert count_weights(last.masks) == sizes[-1] >= round(0.7 * anatomy.prunable_weights)
    assert sizes[-1] < sizes[2] < anatomy.prunable_weights
    assert last.removed > 0


def test_steps_choose_by_what_is_left():
    """Removing in steps chooses other structures than removing at once."""
    kept = []
    for steps in (1, 4):
        model, anatomy = examined("llama")
        (result,) = shots.run_shots(Session(model, anatomy, TEXT, recipe(steps_per_shot=steps)))
        kept.append(result.masks)
        assert count_weights(result.masks) == pytest.approx(0.7 * anatomy.prunable_weights, rel=0.02)
    assert any(not torch.equal(kept[0][name].rows, kept[1][name].rows) for name in kept[0])


@pytest.mark.parametrize("options", [{"structure": "unstructured"}, {"curvature": "nearest-kronecker"}])
def test_what_cannot_be_divided_is_refused(options):
    with pytest.raises(ConfigError, match="steps_per_shot is for"):
        recipe(steps_per_shot=2, **options)
