"""Layer-wise methods end to end on tiny models of the real classes."""

from functools import partial

import pytest
import torch

from llm_surgeon import PruneConfig, prune, prune_checkpoint
from llm_surgeon.curvature.layer_statistics import watch
from llm_surgeon.data.texts import prepare_texts
from llm_surgeon.errors import ConfigError, NonFiniteError, UnsupportedModelError
from llm_surgeon.mathematics.dsnot import Refinement, expected_error
from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.mathematics.scores import SCORES
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import core_of
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.pruning.layerwise import run_layerwise
from llm_surgeon.recipe.methods import LAYERWISE
from llm_surgeon.session.session import Session
from tiny import ALONE, BUILDERS, build, tokenizer, tokens

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 16,
    "batch_size": 3,
    "precision": "float32",
    "eval_window": 32,
    "eval_tokens": 64,
}


def config(text_file, **changes):
    return PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), "evaluation": "none", **changes})


def run(model, text_file, **changes):
    return prune(model, tokenizer(), config(text_file, **changes))


def weights(model):
    """Weights of the prunable layers, without biases."""
    anatomy = examine(model, family_of(model.config.model_type))
    return {name: core_of(model, layer).weight.detach().clone() for name, layer in anatomy.layers.items()}


def kept(model):
    return {name: weight != 0 for name, weight in weights(model).items()}


def sparsity(masks):
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "1:8"])
@pytest.mark.parametrize("method", LAYERWISE)
@pytest.mark.parametrize("family", BUILDERS)
def test_every_method_prunes_every_family(family, method, structure, text_file):
    model = build(family)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dense, pattern = weights(model), Pattern.parse(structure)
    goal = pattern.sparsity if pattern else 0.5
    changes = {"scope": "row"} if method == "magnitude" and not pattern else {}
    changes |= {"shots": 1} if method == "magnitude" else {}
    report = run(model, text_file, method=method, structure=structure, **changes)
    masks = kept(model)
    assert sparsity(masks) == pytest.approx(goal, abs=1e-3)
    assert report.shots[0].sparsity == pytest.approx(goal, abs=1e-3)
    assert report.shots[0].size.total == report.dense_size.total - sum(int((~m).sum()) for m in masks.values())
    if pattern:
        for mask in masks.values():
            assert (mask.view(len(mask), -1, pattern.group).sum(-1) == pattern.kept).all()
    for name, weight in weights(model).items():
        if method == "sparsegpt":
            assert not torch.equal(weight[masks[name]], dense[name][masks[name]])
        else:
            assert torch.equal(weight, dense[name] * masks[name])
    pruned = {f"{name}.weight" for name in dense}
    for name, parameter in model.named_parameters():
        assert name in pruned or torch.equal(parameter, before[name])


@pytest.mark.parametrize("scope", ["row", "layer", "global"])
def test_scopes(scope, text_file):
    model = build("llama")
    report = run(model, text_file, method="wanda", scope=scope, sparsity=0.5)
    masks = kept(model)
    rows = torch.cat([mask.float().mean(1) for mask in masks.values()])
    layers = torch.tensor([mask.float().mean() for mask in masks.values()])
    assert bool((rows == 0.5).all()) == (scope == "row")
    assert bool((layers == 0.5).all()) == (scope != "global")
    assert sparsity(masks) == pytest.approx(0.5, abs=1e-3)
    assert (report.shots[0].threshold is None) == (scope != "global")


def test_a_global_threshold_compares_the_dense_models_scores(text_file):
    model = build("llama")
    settings = config(text_file, method="wanda", scope="global", sparsity=0.4)
    text = prepare_texts(tokenizer(), settings).calibration
    anatomy = examine(model, family_of("llama"))
    sweep, scores = Sweep(model, "model.layers", text, 4, "float32"), {}
    for number in range(2):
        layers = [layer for layer in anatomy.layers.values() if layer.block == number]
        watched = watch(model, sweep, number, layers, grams=False, advance=lambda _: None)
        for layer in layers:
            norm = watched.statistics(layer).input_norm
            scores[layer.name] = core_of(model, layer).weight.detach().abs() * norm
        sweep.pass_through(number)
    everything = torch.cat([score.flatten() for score in scores.values()])
    threshold = everything.sort().values[round(0.4 * len(everything)) - 1]
    run(model, text_file, method="wanda", scope="global", sparsity=0.4)
    for name, mask in kept(model).items():
        assert torch.equal(mask, scores[name] > threshold)


def test_a_block_is_pruned_for_what_the_pruned_blocks_before_it_give(text_file):
    """The norms that Wanda used in the second block are those behind the pruned first block, not the dense one."""
    dense, model = build("llama"), build("llama")
    run(model, text_file, method="wanda", sparsity=0.6)
    text = prepare_texts(tokenizer(), config(text_file, method="wanda")).calibration
    layer = examine(dense, family_of("llama")).layers["model.layers.1.self_attn.q_proj"]

    def mask(first_block):
        """Wanda's mask of a layer of the second block behind a given first block."""
        mixed = build("llama")
        mixed.model.layers[0].load_state_dict(first_block.model.layers[0].state_dict())
        inputs = []
        core_of(mixed, layer).register_forward_pre_hook(lambda _m, arguments: inputs.append(arguments[0]))
        with torch.no_grad():
            mixed(text.input_ids)
        scores = core_of(mixed, layer).weight.detach().abs() * inputs[0].flatten(0, 1).norm(dim=0)
        return scores > scores.sort(dim=1).values[:, round(0.6 * 24) - 1 : round(0.6 * 24)]

    after = kept(model)[layer.name]
    assert torch.equal(after, mask(model))
    assert not torch.equal(after, mask(dense))


def test_blocks_with_outliers_keep_more(text_file):
    model = build("llama")
    with torch.no_grad():
        # A few weights far above the others in the second block.
        model.model.layers[1].mlp.up_proj.weight[:2] *= 30
    run(model, text_file, method="wanda", layer_budget="owl", sparsity=0.5, owl_spread=0.1)
    masks = kept(model)
    first, second = (
        sparsity({name: mask for name, mask in masks.items() if f"layers.{number}." in name}) for number in (0, 1)
    )
    # Whole weights of rows of 16 to 40.
    assert first - second == pytest.approx(0.2, abs=0.03)
    assert sparsity(masks) == pytest.approx(0.5, abs=0.02)


def test_budgets_out_of_bounds_are_refused_before_anything_changes(text_file):
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:2] *= 30
    dense = weights(model)
    with pytest.raises(ConfigError, match="owl-spread"):
        run(model, text_file, method="sparsegpt", layer_budget="owl", sparsity=0.9, owl_spread=0.4)
    assert all(torch.equal(weight, dense[name]) for name, weight in weights(model).items())


@pytest.mark.parametrize("refine", ["dsnot", "r2-dsnot"])
@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["wanda", "magnitude", "ria"])
def test_refinement_lowers_the_expected_error_of_the_first_block(method, structure, refine, text_file, monkeypatch):
    # Of the tiny model, every row is to be refined.
    monkeypatch.setattr("llm_surgeon.pruning.layerwise.Refinement", partial(Refinement, threshold=0.0))
    changes = {"method": method, "structure": structure, "shots": 1, "sparsity": 0.5}
    dense = build("llama")
    text = prepare_texts(tokenizer(), config(text_file, **changes)).calibration
    layers = [layer for layer in examine(dense, family_of("llama")).layers.values() if layer.block == 0]
    sweep = Sweep(dense, "model.layers", text, 4, "float32")
    watched = watch(dense, sweep, 0, layers, grams=False, advance=lambda _: None)
    plain, refined = build("llama"), build("llama")
    scope = {"scope": "row"} if method == "magnitude" and structure == "unstructured" else {}
    run(plain, text_file, **changes, **scope)
    run(refined, text_file, **changes, **scope, refine=refine)
    lower = 0
    for layer in layers:
        weight, mean = core_of(dense, layer).weight.detach(), watched.inputs[layer.input_group].mean
        before, after = (expected_error(weight, kept(model)[layer.name], mean).abs() for model in (plain, refined))
        assert bool((after <= before + 1e-6).all())
        lower += int((after < before - 1e-4).sum())
    assert lower > 20
    # As many weights in each row as before (behind other blocks the scores are others), and what stays is dense.
    assert all(torch.equal(kept(refined)[layer.name].sum(1), kept(plain)[layer.name].sum(1)) for layer in layers)
    for name, mask in kept(refined).items():
        assert torch.equal(weights(refined)[name], weights(dense)[name] * mask)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "ria", "magnitude"])
@pytest.mark.parametrize("family", ALONE)
def test_permuted_channels_keep_more_and_the_dense_function(family, method, text_file, monkeypatch):
    changes = {"method": method, "structure": "2:4", "shots": 1}
    plain, permuted, unpruned = build(family), build(family), build(family)
    run(plain, text_file, **changes)
    run(permuted, text_file, **changes, permute=True)
    masks = kept(permuted)
    assert all((mask.view(len(mask), -1, 4).sum(-1) == 2).all() for mask in masks.values())
    if method == "magnitude":
        # Nothing but the orders differs, so what is kept can be compared; the first block's can for all methods.
        assert sum(float(w.abs().sum()) for w in weights(permuted).values()) > sum(
            float(w.abs().sum()) for w in weights(plain).values()
        )
    # The same run without its pruning leaves the function as it was.
    monkeypatch.setattr("llm_surgeon.pruning.layerwise.keep_in_scope", lambda scores, *_: scores >= 0)
    monkeypatch.setattr(
        "llm_surgeon.pruning.layerwise.solve",
        lambda weight, *_: type("Whole", (), {"weight": weight, "keep": torch.ones_like(weight, dtype=torch.bool)}),
    )
    run(unpruned, text_file, **changes, permute=True)
    with torch.no_grad():
        torch.testing.assert_close(unpruned(tokens()).logits, build(family)(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(weights(unpruned).popitem()[1], weights(build(family)).popitem()[1])


def test_a_model_that_cannot_be_permuted_is_refused_before_any_work(text_file):
    model = build("llama")
    model.model.extra = torch.nn.Linear(24, 24)
    with pytest.raises(UnsupportedModelError, match="extra"):
        run(model, text_file, method="wanda", structure="2:4", permute=True)


def test_ignored_layers_stay_dense_and_are_passed_through(text_file):
    model = build("llama")
    dense = weights(model)
    report = run(model, text_file, method="wanda", ignore=(r"layers\.0\..*", "down_proj"))
    for name, weight in weights(model).items():
        ignored = "layers.0." in name or "down_proj" in name
        assert torch.equal(weight, dense[name]) == ignored
    assert {layer.block for layer in report.layers} == {1}


def test_what_reads_no_data_runs_no_block(text_file, monkeypatch):
    def fail(*_arguments, **_named):
        raise AssertionError("a block was run")

    monkeypatch.setattr("llm_surgeon.pruning.layerwise.Sweep", fail)
    for method in ("magnitude", "symmetric", "ri", "lp-ri"):
        run(build("llama"), text_file, method=method, scope="layer", shots=1, structure="unstructured")
    with pytest.raises(AssertionError, match="block"):
        run(build("llama"), text_file, method="wanda")


def test_scores_that_are_not_finite_are_refused(text_file, monkeypatch):
    monkeypatch.setitem(SCORES, "wanda", lambda weight, *_: weight / 0)
    with pytest.raises(NonFiniteError, match="q_proj"):
        run(build("llama"), text_file, method="wanda")


def test_half_precision_weights_that_stay_are_the_same_bits(text_file):
    model = build("llama").to(torch.bfloat16)
    dense = weights(model)
    run(model, text_file, method="ria", precision="bfloat16")
    for name, weight in weights(model).items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight[weight != 0], dense[name][weight != 0])


def test_progress_adds_up(text_file):
    for changes in (
        {"method": "wanda"},
        {"method": "wanda", "scope": "global"},
        {"method": "ria", "layer_budget": "owl"},
        {"method": "sparsegpt", "structure": "2:4", "permute": True},
        {"method": "magnitude", "structure": "2:4", "permute": True},
        {"method": "wanda", "scope": "global", "refine": "dsnot"},
    ):
        model, settings = build("llama"), config(text_file, **changes)
        text = prepare_texts(tokenizer(), settings).calibration
        announced, done = [], []

        class Meter:
            def phase(self, _description, total, announced=announced, done=done):
                announced.append(total)

                class Phase:
                    def __enter__(self):
                        return self

                    def __exit__(self, *_):
                        return False

                    def advance(self, count):
                        done.append(count)

                return Phase()

        list(run_layerwise(Session(model, examine(model, family_of("llama")), text, settings, Meter())))
        assert sum(announced) == sum(done)


def test_export_reloads_and_the_report_says_what_it_is(checkpoint, tmp_path, text_file):
    out = tmp_path / "out"
    report = prune_checkpoint(str(checkpoint), out, config(text_file, method="ria", refine="dsnot", structure="2:4"))
    assert report.export.max_logit_difference < 1e-3
    assert "`ria`" in (out / "README.md").read_text()
    page = (out / "report.html").read_text()
    assert "ria" in page
    assert not (out / "modeling_pruned.py").exists()
