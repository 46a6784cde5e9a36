"""Reconstruction of experts: the exact solution where experts do not share tokens, and less error where they do."""

from copy import deepcopy

import pytest
import torch

from choosing import shrink
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.experts import routed
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.parts import MixturePart
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.refit import several_writers
from llm_surgeon.refit.reconstruction import Reconstruction, check_stream, reconstruct
from llm_surgeon.refit.several_writers import SeveralWriters
from llm_surgeon.session.session import Session
from tiny import MIXTURES, build, mixtral, tokens

TEXT = CalibrationTokens(tokens(24, 16), None, {})
HOW = Reconstruction(ridge=1e-3, batch_size=7, precision="float32")


def without_an_expert(model):
    """A model without one expert of each group, its dense copy, anatomy and masks."""
    anatomy = examine(model, family_of(model.config.model_type))
    dense, keep = deepcopy(model), anatomy.dense_masks()
    for part in (part for part in anatomy.parts if isinstance(part, MixturePart)):
        for number in range(0, part.experts, part.experts // part.groups):
            for layer in list(part.layers_of_experts())[number]:
                (keep[layer].columns if layer.endswith("down_proj") else keep[layer].rows)[:] = False
    shrink(model, anatomy, keep)
    return model, dense, anatomy, keep


def last_stream(model):
    seen = []
    handle = model.model.layers[-1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model(TEXT.input_ids)
    handle.remove()
    out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return out.flatten(0, -2).double()


def test_with_one_expert_for_each_token_one_round_is_the_least_squares_solution(monkeypatch):
    """Each expert then has tokens of its own, so that the answer of each alone is the answer of all."""
    monkeypatch.setattr(several_writers, "ROUNDS", 1)
    torch.manual_seed(0)
    model, dense, anatomy, keep = without_an_expert(mixtral(num_experts_per_tok=1).eval())
    (part,) = [part for part in anatomy.parts if isinstance(part, MixturePart) and part.block == 1]
    layers = [anatomy.layers[name] for number, name in enumerate(part.writers) if number in part.kept(keep)]
    goal = last_stream(dense)
    before = deepcopy(model)
    sweep = Sweep(model, anatomy.family.blocks, TEXT, 7, "float32")
    sweep.pass_through(0, lambda _tokens: None)
    session = Session(model, anatomy, TEXT, dense=dense)
    goals = [sweep.store.put(part) for part in goal.float().split([len(b.input_ids) * 16 for b in sweep.batches])]
    SeveralWriters(session, keep, anatomy.extents(keep), sweep, 1, layers, 1e-3, "float32", 1.0).correct(goals)

    seen = {}
    for layer in layers:
        core_of(before, layer).register_forward_pre_hook(
            lambda module, arguments, name=layer.name: seen.__setitem__(name, (arguments[0], routed(module)))
        )
    error = goal - last_stream(before)
    count = len(error)
    for layer in layers:
        x, sent = seen[layer.name]
        z = x.detach().double() * sent.weights.double()[:, None]
        a, cross = z.T @ z / count, error[sent.tokens].T @ z / count
        damped = a + 1e-3 * a.diagonal().mean() * torch.eye(len(a))
        wanted = torch.linalg.solve(damped, cross.T).T
        change = (core_of(model, layer).weight - core_of(before, layer).weight).detach().double()
        scale = float((change * wanted).sum() / wanted.square().sum())
        # The line search takes the ridge back as far as it can.
        assert 1 - 1e-6 <= scale < 1.05
        torch.testing.assert_close(change, scale * wanted, rtol=1e-2, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("family", MIXTURES)
def test_the_stream_comes_nearer_to_the_dense_one(family):
    model, dense, anatomy, keep = without_an_expert(build(family))
    goal, start = last_stream(dense), deepcopy(model)
    before = (goal - last_stream(model)).norm()
    check_stream(Session(model, anatomy, TEXT, PruneConfig(precision="float32")))
    reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, HOW)
    assert (goal - last_stream(model)).norm() < 0.8 * before
    assert all(
        torch.equal(core_of(model, layer).weight, core_of(start, layer).weight)
        for name, layer in anatomy.layers.items()
        if not name.endswith(("down_proj", "o_proj"))
    )


def test_where_nothing_is_missing_nothing_changes():
    model = build("mixtral")
    anatomy = examine(model, family_of("mixtral"))
    dense = deepcopy(model)
    reconstruct(Session(model, anatomy, TEXT, dense=dense), anatomy.dense_masks(), HOW)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.testing.assert_close(parameter, dense.get_parameter(name), rtol=1e-3, atol=1e-4)
