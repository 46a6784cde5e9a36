"""Scores of experts against sums over tokens that are written out, and what they may be used for."""

import pytest
import torch

from llm_surgeon import PruneConfig
from llm_surgeon.curvature import estimate, estimation_of
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.expert_scores import EXPERT_SCORES, extreme
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.parts import MixturePart
from llm_surgeon.pruning.shots import run_shots
from llm_surgeon.recipe.methods import METHODS
from llm_surgeon.session.session import Session
from tiny import build, tokens

TEXT = CalibrationTokens(tokens(6, 16), None, {})


def recipe(method, **options):
    settings = {"method": method, "structure": "experts", "sparsity": 0.25, "samples": 6, "seq_len": 16, "shots": 1}
    return PruneConfig.from_mapping({**settings, "precision": "float32", **options})


@torch.no_grad()
def written_out(model):
    """Scores of the experts of the first mixture by name of the criterion, from the class's own parameters."""
    block = next(block for block in model.model.layers if hasattr(block.mlp, "experts"))
    experts, router = block.mlp.experts, block.mlp.gate
    seen = []
    handle = block.mlp.register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0]))
    model(TEXT.input_ids)
    handle.remove()
    # Positions with a label are those that count.
    hidden = seen[0][:, :-1].flatten(0, 1)
    _, weights, chosen = router(hidden)
    count = experts.gate_up_proj.shape[0]
    tokens_of, norms, weighted = torch.zeros(count), torch.zeros(count), torch.zeros(count)
    for x, own_weights, own in zip(hidden, weights, chosen, strict=True):
        for weight, expert in zip(own_weights / own_weights.sum(), own, strict=True):
            gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
            norm = (experts.down_proj[expert] @ (experts.act_fn(gate) * up)).norm()
            tokens_of[expert] += 1
            norms[expert] += norm
            weighted[expert] += weight * norm
    return {"reap": weighted / tokens_of, "mean-norm": norms / tokens_of, "frequency": tokens_of}


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "glm4-moe"])
@pytest.mark.parametrize("method", EXPERT_SCORES)
def test_scores_are_those_written_out_and_the_lowest_goes(family, method):
    wanted = written_out(build(family))[method].double()
    model = build(family)
    anatomy = examine(model, family_of(model.config.model_type))
    config = recipe(method, sparsity=0.25 if family == "mixtral" else 0.15)
    session = Session(model, anatomy, TEXT, config)
    (part, *_) = (part for part in anatomy.parts if isinstance(part, MixturePart))
    found = estimate(session, anatomy.dense_masks(), estimation_of(config)).scores
    scores = torch.tensor([found[name] for name in part.writers], dtype=torch.float64)
    # The expert of the largest peak of all blocks is kept at any rate.
    plain = scores < 1e5 * wanted.max()
    assert plain.sum() >= part.experts - 1
    torch.testing.assert_close(scores[plain], wanted[plain], rtol=1e-4, atol=1e-5)
    for result in run_shots(session):
        kept = part.kept(result.masks)
    for group in range(part.groups):
        members = range(group * part.experts // part.groups, (group + 1) * part.experts // part.groups)
        gone = [number for number in members if number not in kept]
        assert gone == sorted(members, key=lambda number: scores[number])[: len(gone)]
        assert gone


def test_extreme_experts_are_rare_and_large():
    peaks = torch.tensor([1.0] * 300 + [50.0, 8.0, 900.0])
    assert extreme(peaks).nonzero().flatten().tolist() == [302]
    assert extreme(torch.ones(400)).all(), "none stands out, and the order stays as it is"


@pytest.mark.parametrize("method", EXPERT_SCORES)
@pytest.mark.parametrize("structure", ["neurons", "experts+heads", "rows-columns", "unstructured"])
def test_scores_of_experts_say_nothing_of_other_structures(method, structure):
    with pytest.raises(ConfigError, match=f"{method} ranks experts and nothing else"):
        recipe(method, structure=structure)


def test_each_score_is_a_method():
    assert {name for name, row in METHODS.items() if row.curvatures[:1] == (name,)} == set(EXPERT_SCORES)
