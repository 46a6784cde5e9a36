"""Coupled structures from costs to exports, on tiny models of the real classes."""

import itertools

import pytest
import torch

from choosing import attentions, delta_nets, feed_forwards, made_up_costs
from llm_surgeon import PruneConfig, prune
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.fisher import Damping, KroneckerProduct
from llm_surgeon.mathematics.keep_masks import count_weights
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import read_matrix
from llm_surgeon.pruning.shapes import Shapes, check_shapes
from llm_surgeon.pruning.shots import run_shots
from llm_surgeon.session.session import Session
from oracles import constrained_minimum, fisher, random_factor
from tiny import BUILDERS, build, llama, tokenizer, tokens

families = pytest.mark.parametrize("family", BUILDERS)
TEXT = CalibrationTokens(tokens(8, 16), None, {})


def config(**options):
    settings = {
        "preset": "none",
        "samples": 8,
        "seq_len": 16,
        "precision": "float32",
        "dampening_g": 0.5,
        "shots": 2,
        "round_to": None,
    }
    return PruneConfig.from_mapping({**settings, **options})


def examined(family):
    model = build(family)
    return model, examine(model, family_of(model.config.model_type))


def pruned(family, **options):
    model, anatomy = examined(family)
    for result in run_shots(Session(model, anatomy, TEXT, config(**options))):
        last = result
    return model, anatomy, last


def skip_refused(family, structure):
    entries = family_of(build(family).config.model_type).parts
    if any(part in entry.refused for entry in entries for part in structure.split("+")):
        pytest.skip("no part of the family has heads that can go alone")


@pytest.mark.parametrize("family", ["olmo2", "olmo3"])
@pytest.mark.parametrize("structure", ["heads", "neurons+heads", "heads+neurons"])
def test_heads_that_share_a_norm_are_refused(family, structure):
    _, anatomy = examined(family)
    with pytest.raises(ConfigError, match="normalises queries and keys over all heads") as caught:
        check_shapes(config(structure=structure, round_to=1 if "neurons" in structure else None), anatomy)
    assert caught.value.remedy == "Use --structure neurons."


@families
@pytest.mark.parametrize("structure", ["neurons", "heads", "neurons+heads", "blocks", "values+neurons"])
def test_only_the_structures_asked_for_go(family, structure):
    """Each is taken whole, and the target is not exceeded."""
    skip_refused(family, structure)
    sparsity, multiple = {"heads": 0.15, "neurons": 0.3}.get(structure, 0.35), 1 if "neurons" in structure else None
    _, anatomy, result = pruned(family, structure=structure, sparsity=sparsity, round_to=multiple)
    assert 0 < 1 - count_weights(result.masks) / anatomy.prunable_weights <= sparsity
    assert result.removed > 0
    parts = set(structure.split("+"))
    for part in attentions(anatomy):
        heads, dims = part.present_heads(result.masks), result.masks[part.value.layer].rows[part.value.index]
        assert parts & {"heads", "blocks", "values"} or heads.all()
        assert "values" in parts or ((dims.sum(1) == 0) | (dims.sum(1) == part.width)).all()
        assert "blocks" not in parts or heads.all() or not heads.any()
    for part in delta_nets(anatomy):
        heads, dims = part.present_heads(result.masks), result.masks[part.value.layer].rows[part.value.index]
        assert parts & {"heads", "blocks", "values"} or heads.all()
        assert "values" in parts or (dims.any(2) == dims.all(2)).all()
        assert "blocks" not in parts or heads.all() or not heads.any()
    for part in feed_forwards(anatomy):
        neurons = result.masks[part.output.layer].columns
        assert parts & {"neurons", "blocks"} or neurons.all()
        assert "blocks" not in parts or neurons.all() or not neurons.any()
        for rows in part.inputs:
            assert torch.equal(result.masks[rows.layer].rows[rows.index], neurons)


@families
def test_no_block_is_emptied_unless_asked(family):
    """At the largest sparsity that can be reached there is still something everywhere."""
    skip_refused(family, "neurons+heads")
    _, anatomy = examined(family)
    recipe = config(structure="neurons+heads", round_to=1, min_width=0.2)
    structure = Shapes(recipe, anatomy)
    keep = structure.select(made_up_costs(structure, anatomy, torch.ones), 0).keep
    for part in feed_forwards(anatomy):
        assert int(keep[part.output.layer].columns.sum()) == 8
    for part in (*attentions(anatomy), *delta_nets(anatomy)):
        assert part.present_heads(keep).any()
    emptied = Shapes(config(structure="neurons+heads", round_to=1, min_width=0.0), anatomy)
    assert count_weights(emptied.select(made_up_costs(emptied, anatomy, torch.ones), 0).keep) == 0


@pytest.mark.parametrize("structure", ["neurons", "neurons+heads"])
def test_uniform_widths_are_equal_and_multiples(structure):
    _, anatomy, result = pruned("llama", structure=structure, sparsity=0.4, uniform=True, round_to=8)
    assert len({int(result.masks[part.output.layer].columns.sum()) for part in feed_forwards(anatomy)}) == 1
    assert {int(result.masks[part.output.layer].columns.sum()) % 8 for part in feed_forwards(anatomy)} == {0}
    assert len({int(part.present_heads(result.masks).sum()) for part in attentions(anatomy)}) == 1


def test_what_fits_beyond_the_threshold_is_taken_if_candidates_are_large():
    """A head of all blocks is too large at the end; neurons of less worth still fit."""
    _, anatomy, result = pruned("llama", structure="neurons+heads", sparsity=0.4, uniform=True, round_to=2, shots=1)
    step = 2 * 3 * 24 * len(feed_forwards(anatomy))
    left = count_weights(result.masks) - 0.6 * anatomy.prunable_weights
    assert 0 <= left < step or all(
        int(result.masks[part.output.layer].columns.sum()) <= 2 for part in feed_forwards(anatomy)
    )


def test_query_heads_go_one_of_each_key():
    model = llama(num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    anatomy = examine(model, family_of("llama"))
    recipe = config(structure="heads", sparsity=0.2, shots=1)
    (result,) = run_shots(Session(model, anatomy, TEXT, recipe))
    counts = [part.present_heads(result.masks).sum(1).tolist() for part in attentions(anatomy)]
    assert all(len(set(count) - {0}) == 1 for count in counts)
    assert any(0 < max(count) < 4 for count in counts)


def test_costs_of_sides_are_those_of_least_squares():
    """The cost of each side of each group of a real layout, from dense constrained least squares on the layer."""
    model, anatomy = examined("llama")
    structure = Shapes(config(structure="heads+blocks"), anatomy)
    generator = torch.Generator().manual_seed(0)
    part = attentions(anatomy)[0]
    layer = anatomy.layers[part.value.layer]
    weight = read_matrix(model, layer).double()
    a, g = random_factor(layer.columns, generator), random_factor(layer.rows, generator)
    found = structure.costs(layer, weight, KroneckerProduct(g, a, Damping(1e-30, 1e-30), "v")).sides
    hessian, theta = fisher(a, g), weight.flatten()
    checked = 0
    for key, costs in found.items():
        side = structure._couplings[key.coupling].sides[key.side]
        for group, index in enumerate(side.index):
            removed = torch.zeros_like(weight, dtype=torch.bool)
            removed[index] = True
            expected, _ = constrained_minimum(hessian, theta, removed.flatten())
            torch.testing.assert_close(float(costs[group]), expected, rtol=1e-6, atol=1e-8)
            checked += 1
    # Two key/value heads, and the attention.
    assert checked == 3


def test_a_group_is_killed_by_its_cheapest_side_and_only_that_is_made_up_for():
    _, anatomy = examined("llama")
    structure = Shapes(config(structure="heads"), anatomy)
    costs = made_up_costs(structure, anatomy, lambda count: torch.full((count,), 9.0))
    keys = {structure._couplings[key.coupling].kind: key for key in costs[attentions(anatomy)[0].value.layer].sides}
    cheap = costs[attentions(anatomy)[0].value.layer].sides[keys["key/value group"]]
    cheap[1] = 0.5
    freed = 2 * 8 * 24 + 2 * 16 * 24
    selection = structure.select(costs, anatomy.prunable_weights - freed)
    part = attentions(anatomy)[0]
    assert selection.chosen[part.value.layer].rows.nonzero().flatten().tolist() == part.value.index[1].tolist()
    assert not selection.chosen[part.output.layer].columns.any()
    assert not selection.keep[part.output.layer].columns[part.output.index[1]].any()
    assert not selection.keep[part.query.layer].rows[part.query.index[1]].any()
    assert selection.loss == pytest.approx(0.5)
    assert selection.structures_chosen == 8


def test_emptied_parts_stay_emptied_in_later_shots():
    _, anatomy = examined("llama")
    sizes = []
    model = build("llama")
    recipe = config(structure="blocks", sparsity=0.7, shots=3)
    for result in run_shots(Session(model, anatomy, TEXT, recipe)):
        sizes.append(count_weights(result.masks))
    assert all(later <= earlier for earlier, later in itertools.pairwise(sizes))
    assert sizes[-1] < 0.7 * anatomy.prunable_weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "neurons+neurons"}, "valid are rows-columns, neurons"),
        ({"structure": "neurons+2:4"}, "valid are"),
        ({"structure": "values", "uniform": True}, "uniform is for neurons, heads, experts and blocks"),
        ({"uniform": True}, "uniform is for neurons, heads, experts and blocks"),
        ({"structure": "blocks+neurons", "uniform": True}, "uniform blocks go whole"),
        ({"structure": "heads", "round_to": 8}, "round_to is for structures with neurons"),
        ({"structure": "unstructured", "min_width": 0.1}, "min_width is for structures that shrink"),
        ({"structure": "heads", "curvature": "kronecker-sum"}, "no joint costs"),
        ({"structure": "heads", "method": "wanda"}, "removes single weights"),
    ],
)
def test_impossible_combinations_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PruneConfig.from_mapping(options)


@pytest.mark.parametrize("method", ["k-obd", "l-obd", "magnitude", "obs-activations"])
def test_every_global_method_has_coupled_structures(method, text_file):
    options = {"calibration": str(text_file), "evaluation": "none", "method": method}
    report = prune(build("llama"), tokenizer(), config(structure="neurons+heads", sparsity=0.4, round_to=1, **options))
    assert 0.3 < report.shots[-1].sparsity <= 0.4
    assert report.shots[-1].costs.score == "cost per weight freed"
    assert sum(report.shots[-1].costs.removed) > 0


@pytest.mark.parametrize(
    ("structure", "options"),
    [
        ("neurons", {"curvature": "kronecker-sum"}),
        ("neurons+heads", {"curvature": "nearest-kronecker"}),
        ("neurons+heads", {"curvature": "diagonal", "method": "k-obd"}),
        ("heads+rows-columns", {}),
        ("blocks+rows-columns", {"rank_by": "cost"}),
    ],
)
def test_other_curvatures_and_mixtures(structure, options):
    multiple = {"round_to": 1} if "neurons" in structure else {}
    _, anatomy, result = pruned("llama-biased", structure=structure, sparsity=0.4, **multiple, **options)
    assert 0.3 < 1 - count_weights(result.masks) / anatomy.prunable_weights <= 0.4
    assert result.removed > 0
    assert result.costs.threshold == result.threshold
