"""Mixtures of experts: the canonical form, K-FAC of routed tokens, whole experts and their neurons, exports."""

import itertools
import json
import re
import subprocess
import sys
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from choosing import shrink
from llm_surgeon import PruneConfig, plan, prune_checkpoint
from llm_surgeon.curvature import Estimation, estimate
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError
from llm_surgeon.export.form import form_of
from llm_surgeon.export.save import save_model
from llm_surgeon.export.verify import verify_export
from llm_surgeon.mathematics.fisher import Damping
from llm_surgeon.mathematics.keep_masks import count_weights
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.experts import Experts, routed_tokens
from llm_surgeon.models.matrix import read_matrix
from llm_surgeon.models.parts import MixturePart
from llm_surgeon.passes.task import Task
from llm_surgeon.pruning.checkpoint import Checkpoints
from llm_surgeon.pruning.loops import loop_of
from llm_surgeon.pruning.shapes import Shapes, check_shapes
from llm_surgeon.pruning.shots import run_shots
from llm_surgeon.refit.gates import gates_of, moments
from llm_surgeon.session.session import Session
from llm_surgeon.testing import check_family
from tiny import MIXTURES, build, byte_tokenizer, glm4_moe, tokenizer, tokens

# A block of these is dense, or has experts that stay.
SMALLER = ("qwen3-moe", "glm4-moe", "deepseek-v3", "qwen3-5-moe")
mixtures = pytest.mark.parametrize("family", MIXTURES)
HOW = Estimation(batch_size=3, precision="float32")
TEXT = CalibrationTokens(tokens(24, 16), None, {})


def recipe(structure, sparsity=0.25, **options):
    rounding = {"round_to": 1} if "neurons" in structure else {}
    settings = {"preset": "none", "samples": 24, "seq_len": 16, "precision": "float32", "dampening_g": 0.5, "shots": 2}
    return PruneConfig.from_mapping({**settings, "structure": structure, "sparsity": sparsity, **rounding, **options})


def examined(family):
    model = build(family)
    return model, examine(model, family_of(model.config.model_type))


def mixtures_of(anatomy):
    return [part for part in anatomy.parts if isinstance(part, MixturePart)]


def logits(model, ids=None):
    with torch.no_grad():
        return model(tokens(3, 12, seed=7) if ids is None else ids).logits


@mixtures
def test_the_entry_is_right(family):
    model = build(family)
    check_family(family_of(model.config.model_type), model)


@mixtures
def test_the_canonical_form_computes_the_same_and_shares_the_weights(family):
    model = build(family)
    expected = logits(model)
    parameter = next(p for name, p in model.named_parameters() if name.endswith("experts.down_proj"))
    anatomy = examine(model, family_of(model.config.model_type))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    (first, *_) = mixtures_of(anatomy)
    layer = model.get_submodule(first.writers[2])
    assert layer.weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    assert torch.equal(layer.weight, first.entry.layout.oriented(parameter[2]))
    # Nothing was taken for prunable twice, or left out.
    count = sum(p.numel() for n, p in build(family).named_parameters() if "proj" in n and "bias" not in n)
    assert anatomy.prunable_weights == count


def by_token(model, anatomy, ids):
    """Gradient of each token's loss by each layer's weights, ``[tokens, R, C]``, by plain autograd."""
    out = model(ids).logits[:, :-1].flatten(0, 1)
    losses = F.cross_entropy(out, ids[:, 1:].flatten(), reduction="none")
    found = {name: [] for name in anatomy.layers}
    for loss, name in itertools.product(losses, found):
        module = model.get_submodule(name)
        parts = [module.weight] if module.bias is None else [module.weight, module.bias]
        gradients = torch.autograd.grad(loss, parts, retain_graph=True, allow_unused=True)
        whole = [torch.zeros_like(x) if g is None else g for x, g in zip(parts, gradients, strict=True)]
        found[name].append(torch.cat([x.view(len(module.weight), -1) for x in whole], dim=1))
    return {name: torch.stack(items) for name, items in found.items()}


@mixtures
def test_one_labelled_token_gives_the_exact_fisher(family):
    """With one token a gradient is one outer product; experts that it is not sent to have a Fisher of zero."""
    model, anatomy = examined(family)
    ids = tokens(1, 2)
    keep = anatomy.dense_masks()
    curvature = estimate(Session(model, anatomy, CalibrationTokens(ids, None, {})), keep, HOW)
    exact = by_token(model, anatomy, ids)
    idle = 0
    for name, layer in anatomy.layers.items():
        a, g = curvature.input_factor(layer, keep[name]), curvature.gradient_factor(layer)
        wanted = exact[name].flatten(1)
        wanted = wanted.T @ wanted
        idle += ".experts." in name and not wanted.any()
        torch.testing.assert_close(torch.kron(g, a), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-12)
    unused = sum(part.experts - 2 for part in mixtures_of(anatomy))
    assert idle == 3 * unused, "two experts of each block are chosen"


@mixtures
def test_experts_are_on_the_scale_of_all_tokens(family):
    """K-FAC keeps ``E |a|^2 |g|^2`` of the exact Fisher's trace up to a correlation, for few routed tokens as for all.

    The trace of a mean over the routed tokens alone would be too large by all tokens over the routed ones, and that of
    both sums over all tokens too small by as much.
    """
    model, anatomy = examined(family)
    ids = tokens(24, 8)
    keep = anatomy.dense_masks()
    curvature = estimate(Session(model, anatomy, CalibrationTokens(ids, None, {})), keep, HOW)
    plain = {name: layer for name, layer in anatomy.layers.items() if ".experts." in name}
    count = ids[:, 1:].numel()
    seen = {}

    def watch(name):
        def hook(_module, arguments, output):
            output.retain_grad()
            seen[name] = arguments[0].detach(), output, routed_tokens(_module)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in plain]
    out = model(ids).logits
    F.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for name, layer in plain.items():
        x, y, routed = seen[name]
        counted = (routed + 1) % ids.shape[1] != 0
        a, g = x[counted].double(), y.grad[counted].double()
        a = torch.cat([a, a.new_ones(len(a), 1)], dim=1) if layer.bias else a
        share = len(a) / count
        assert 0 < share < 1
        wanted = share * (a.T @ a / len(a)).trace() * (g.T @ g / len(g)).trace()
        found = curvature.input_factor(layer, keep[name]).trace() * curvature.gradient_factor(layer).trace()
        assert float(found) == pytest.approx(float(wanted), rel=1e-3)


def costs_of(model, anatomy, structure="experts"):
    """Costs of all experts, by the number of the expert, for each mixture."""
    keep = anatomy.dense_masks()
    curvature = estimate(Session(model, anatomy, TEXT), keep, HOW)
    shapes = Shapes(recipe(structure, 0.2, uniform=True), anatomy)
    found = {}
    for name, layer in anatomy.layers.items():
        weight = read_matrix(model, layer)
        costs = shapes.costs(layer, weight, curvature.fisher(layer, keep[name], Damping(0.1, 0.1)))
        found[name] = [float(cost) for cost in costs.sides.values()]
    return [[min(x for layer in trio for x in found[layer]) for trio in trios(part)] for part in mixtures_of(anatomy)]


def trios(part):
    groups = part.input_groups
    return [(*groups[2 * number], *groups[2 * number + 1]) for number in range(part.experts)]


@mixtures
def test_a_dead_expert_costs_nothing_and_goes_first(family):
    model, anatomy = examined(family)
    (part, *_) = mixtures_of(anatomy)
    with torch.no_grad():
        model.get_submodule(part.writers[1]).weight.zero_()
    costs = costs_of(model, anatomy)[0]
    assert costs[1] <= 1e-12 < min(costs[:1] + costs[2:])


@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_an_expert_that_the_router_never_chooses_costs_nothing(family, monkeypatch):
    model, anatomy = examined(family)
    (part, *_) = mixtures_of(anatomy)
    router = model.get_submodule(part.prefix + part.entry.router)
    others = deepcopy(router)
    others.weight = torch.nn.Parameter(router.weight[:3].detach())

    def three(hidden):
        scores, weights, chosen = others(hidden)
        return scores, weights, chosen

    monkeypatch.setattr(router, "forward", three)
    costs = costs_of(model, anatomy)[0]
    assert costs[3] <= 1e-12 < min(costs[:3])


def test_an_expert_that_stands_there_twice_costs_a_quarter_each():
    """Two experts with half of the output each compute what one does; all tokens go to all, by weights of their own.

    The function and all gradients by what an expert puts out stay the same. A removal changes half as much, and costs
    are quadratic in that.
    """
    options = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}
    whole = glm4_moe(n_routed_experts=3, num_experts_per_tok=3, **options).eval()
    doubled = glm4_moe(n_routed_experts=4, num_experts_per_tok=4, **options).eval()
    state, order = whole.state_dict(), torch.tensor([0, 1, 2, 0])
    for name, tensor in doubled.state_dict().items():
        source = state[name]
        tensor.copy_(source if source.shape == tensor.shape else source[order])
        if name.endswith("experts.down_proj"):
            tensor[[0, 3]] /= 2
    torch.testing.assert_close(logits(doubled), logits(whole))
    both = [examine(model, family_of("glm4_moe")) for model in (whole, doubled)]

    of_one, of_two = (costs_of(model, anatomy) for model, anatomy in zip((whole, doubled), both, strict=True))

    for once, twice in zip(of_one, of_two, strict=True):
        assert twice[0] == pytest.approx(once[0] / 4, rel=1e-4)
        assert twice[3] == pytest.approx(once[0] / 4, rel=1e-4)
        assert twice[1:3] == pytest.approx(once[1:], rel=1e-4)


@mixtures
@pytest.mark.parametrize(("structure", "sparsity"), [("experts", 0.25), ("neurons", 0.2), ("heads+experts", 0.3)])
@pytest.mark.parametrize("uniform", [True, False])
def test_shots_shrink_the_model_and_a_plain_class_loads_it(family, structure, sparsity, uniform, tmp_path):
    model, anatomy = examined(family)
    refused = {name for entry in anatomy.family.parts for name in entry.refused}
    offered = {name for entry in anatomy.family.parts for name in entry.structures} - refused
    if not set(structure.split("+")) <= offered:
        with pytest.raises(ConfigError, match=anatomy.family.model_class):
            check_shapes(recipe(structure, sparsity, uniform=uniform), anatomy)
        return
    sparsity = sparsity * 0.6 if family in SMALLER else sparsity
    for result in run_shots(Session(model, anatomy, TEXT, recipe(structure, sparsity, uniform=uniform))):
        keep = result.masks
    assert 0 < 1 - count_weights(keep) / anatomy.prunable_weights <= sparsity + 1e-9
    for part in mixtures_of(anatomy):
        module = model.get_submodule(part.prefix + part.entry.experts)
        router = model.get_submodule(part.prefix + part.entry.router)
        assert isinstance(module, Experts)
        assert module.present == part.kept(keep)
        assert len(router.weight) == len(module.present) >= part.chosen * part.groups
        in_groups = torch.bincount(torch.tensor(module.present) * part.groups // part.experts)
        assert len(set(in_groups.tolist())) == 1, "groups keep equally many experts"
        left = {int(keep[part.writers[number]].columns.sum()) for number in module.present}
        assert len(left) == 1, "experts of a block have equally many neurons"
        assert left == {part.width} or "neurons" in structure
    form = save_model(model, tokenizer(), anatomy, keep, tmp_path)
    assert form.plain or not uniform
    check = verify_export(model, tmp_path)
    assert check.difference <= 1e-4 * check.scale
    if form.plain:
        # The file has the tensors that checkpoints of the family have: of each expert, but for gpt-oss.
        names = load_file(tmp_path / "model.safetensors")
        assert any(re.search(r"experts\.\d", name) for name in names) == (family != "gpt-oss")
        written = json.loads((tmp_path / "config.json").read_text())
        assert written["model_type"] == model.config.model_type


STRANGER = """
import sys
sys.modules["llm_surgeon"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
probe, *exports = sys.argv[1:]
ids, results = load_file(probe)["ids"], {}
for export in exports:
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()
    with torch.inference_mode():
        results[export] = model(ids).logits.contiguous()
        model.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
save_file(results, probe + ".out")
"""


@mixtures
def test_uneven_experts_and_emptied_attentions_are_loaded_by_a_stranger(family, tmp_path):
    expected = {}
    # The attention of DeepSeek V3 has no structures.
    for name in ("uneven", "emptied")[: 1 if family == "deepseek-v3" else 2]:
        model, anatomy = examined(family)
        keep = anatomy.dense_masks()
        parts = mixtures_of(anatomy)
        gone = [(part, n) for part in parts for n in range(0, part.experts, part.experts // part.groups)]
        for part, number in gone if name == "emptied" else gone[: parts[0].groups]:
            for layer in trios(part)[number]:
                axis = keep[layer].columns if layer.endswith("down_proj") else keep[layer].rows
                axis[:] = False
        if name == "emptied":
            first = min(layer.block for layer in anatomy.layers.values() if "self_attn" in layer.name)
            for layer in anatomy.layers.values():
                if "self_attn" in layer.name and layer.block == first:
                    (keep[layer.name].columns if "o_proj" in layer.name else keep[layer.name].rows)[:] = False
        shrink(model, anatomy, keep)
        expected[name] = logits(model)
        form = save_model(model, tokenizer(), anatomy, keep, tmp_path / name)
        several = name == "uneven" and len(parts) > 1
        assert form.kind == {"uneven": "per layer" if several else "plain", "emptied": "gaps"}[name]
    save_file({"ids": tokens(3, 12, seed=7)}, tmp_path / "probe")
    places = {name: str(tmp_path / name) for name in expected}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "probe"), *places.values()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = load_file(tmp_path / "probe.out")
    for name, place in places.items():
        torch.testing.assert_close(results[place], expected[name], rtol=1e-4, atol=1e-4, msg=name)


@mixtures
@pytest.mark.parametrize("structure", ["rows-columns", "values", "blocks", "experts+blocks"])
def test_what_a_tensor_of_all_experts_cannot_hold_is_refused(family, structure):
    _, anatomy = examined(family)
    options = {"uniform": False} if "experts" in structure else {}
    with pytest.raises(ConfigError, match=f"{anatomy.family.model_class} has .*experts") as caught:
        check_shapes(recipe(structure, **options), anatomy)
    assert "--structure" in caught.value.remedy


def test_experts_of_a_dense_model_are_refused():
    _, anatomy = examined("llama")
    with pytest.raises(ConfigError, match="no experts"):
        check_shapes(recipe("experts"), anatomy)


def test_no_fewer_experts_stay_than_a_token_is_sent_to():
    _, anatomy = examined("mixtral")
    with pytest.raises(ConfigError, match="can be removed, and 60 % are to be") as caught:
        check_shapes(recipe("experts", 0.6), anatomy)
    assert "as many stay in each block as a token is sent to" in caught.value.remedy


def test_a_rounding_that_is_too_coarse_for_experts_is_named():
    _, anatomy = examined("mixtral")
    with pytest.raises(ConfigError) as caught:
        check_shapes(recipe("neurons", 0.25, round_to=None), anatomy)
    assert "a lower --round-to than 32" in caught.value.remedy


def test_experts_are_uniform_unless_a_recipe_says_otherwise():
    assert recipe("experts").uniform
    assert recipe("heads+experts").uniform
    assert not recipe("experts", uniform=False).uniform
    assert not recipe("neurons").uniform


def stored(family, directory):
    """A checkpoint ``dense`` in a directory, and the file of a text beside it."""
    build(family).save_pretrained(directory / "dense")
    # Letter by letter, as some families' classes of tokenizers take the merges of a file and not its way of splitting.
    byte_tokenizer().save_pretrained(directory / "dense")
    text = directory / "text.txt"
    text.write_text("".join(chr(97 + int(x) % 26) for x in tokens(50, 16, seed=3).flatten()))
    return text


@mixtures
def test_a_run_goes_from_a_checkpoint_to_an_export(family, tmp_path):
    """With resident weights and with streamed ones."""
    text = stored(family, tmp_path)
    files = {"calibration": str(text), "evaluation": str(text), "eval_window": 16, "eval_tokens": 160}
    given = {"dtype": "float32", "sparsity": 0.15 if family in SMALLER else 0.25}
    config = recipe("experts", **{**files, **given})
    report = prune_checkpoint(str(tmp_path / "dense"), tmp_path / "one", config)
    assert report.shots
    whole = load_file(tmp_path / "one" / "model.safetensors")
    prune_checkpoint(str(tmp_path / "dense"), tmp_path / "two", config.model_copy(update={"weights": "streamed"}))
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert whole.keys() == again.keys()
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert sum(x.numel() for x in whole.values()) < sum(x.numel() for x in dense.values())


def test_the_form_knows_equal_counts_of_experts():
    _, anatomy = examined("mixtral")
    keep = anatomy.dense_masks()
    for part in mixtures_of(anatomy):
        for layer in trios(part)[1]:
            (keep[layer].columns if layer.endswith("down_proj") else keep[layer].rows)[:] = False
    settings = form_of(anatomy, keep, build("mixtral").config).settings
    assert settings["num_local_experts"] == 3


@mixtures
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_layerwise_methods_reach_into_experts(family, method, tmp_path):
    """Single weights of each expert, by the tokens that are sent to it; the class and its shapes stay."""
    model, anatomy = examined(family)
    config = PruneConfig.from_mapping(
        {"method": method, "structure": "2:4", "samples": 24, "seq_len": 16, "precision": "float32"}
    )
    for result in loop_of(config).run(Session(model, anatomy, TEXT, config), None):
        masks = result.masks
    assert masks.keys() == anatomy.layers.keys()
    for part in mixtures_of(anatomy):
        for name in part.layers:
            weight = model.get_submodule(name).weight
            assert float((weight == 0).float().mean()) == pytest.approx(0.5)
    form = save_model(model, tokenizer(), anatomy, None, tmp_path)
    assert form.plain
    assert verify_export(model, tmp_path).difference <= 1e-4


@mixtures
def test_a_plan_names_the_class_and_counts_all_experts(family, tmp_path):
    stored(family, tmp_path)
    found = plan(str(tmp_path / "dense"), recipe("experts", 0.15 if family in SMALLER else 0.25, dtype="float32"))
    _, anatomy = examined(family)
    assert found.dense_size.prunable == anatomy.prunable_weights
    assert found.size.prunable < anatomy.prunable_weights


@mixtures
def test_effects_of_gates_belong_to_their_tokens_where_experts_are_idle_in_a_batch(family):
    """Batches of one short sequence leave some experts without tokens; moments are those of one large batch."""
    text = CalibrationTokens(tokens(12, 3), None, {})
    found = []
    for size in (1, 12):
        model, anatomy = examined(family)
        session = Session(model, anatomy, text)
        task = Task(session, anatomy.dense_masks(), Estimation(size, "float32"))
        found.append(moments(task, gates_of(anatomy)))
    scale = float(found[1].fisher.abs().max())
    torch.testing.assert_close(found[0].slopes, found[1].slopes, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[0].fisher, found[1].fisher, rtol=1e-3, atol=1e-4 * scale)


@mixtures
def test_an_ended_run_goes_on_to_the_same_weights(family, tmp_path, monkeypatch):
    """After the first of two shots the routers know fewer experts, which the continued run has to find again."""
    text = stored(family, tmp_path)
    # One expert of each group goes in each shot.
    _, anatomy = examined(family)
    layers = [trios(part)[n] for part in mixtures_of(anatomy) for n in range(2 * part.groups)]
    weights = sum(anatomy.layers[name].rows * anatomy.layers[name].columns for trio in layers for name in trio)
    options = {"sparsity": weights / anatomy.prunable_weights - 1e-9, "dtype": "float32", "evaluation": "none"}
    config = recipe("experts", calibration=str(text), **options)
    report = prune_checkpoint(str(tmp_path / "dense"), tmp_path / "whole", config)
    assert report.shots[0].size.prunable > report.shots[1].size.prunable
    write = Checkpoints.write

    def interrupted(self, checkpoint, tensors):
        write(self, checkpoint, tensors)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(str(tmp_path / "dense"), tmp_path / "ended", config)
    prune_checkpoint(str(tmp_path / "dense"), tmp_path / "ended", config)
    whole, ended = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "ended"))
    assert whole.keys() == ended.keys()
    assert all(torch.equal(tensor, ended[name]) for name, tensor in whole.items())
