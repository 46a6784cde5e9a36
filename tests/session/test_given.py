"""The Python API given what people have at hand: named errors, and models put to use and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, LlamaForCausalLM

import tiny
from llm_surgeon import PruneConfig, evaluate, plan, prune, prune_checkpoint
from llm_surgeon.errors import ConfigError, NonFiniteError, OutputError, UnsupportedModelError
from llm_surgeon.session.given import ready

SMALL = {
    **{"sparsity": 0.3, "samples": 4, "seq_len": 16, "eval_window": 32, "eval_tokens": 320},
    **{"preset": "none", "shots": 1},
}


@pytest.fixture
def recipe(text_file):
    return PruneConfig.from_mapping({**SMALL, "calibration": str(text_file)})


def with_adapters(checkpoint):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny.llama(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))


MODELS = {
    "adapters": (with_adapters, "merge_and_unload"),
    "no head": (AutoModel.from_pretrained, "AutoModelForCausalLM"),
    "a classifier": (AutoModelForSequenceClassification.from_pretrained, "AutoModelForCausalLM"),
    "a name": (str, "prune_checkpoint"),
    "compiled": (lambda _: torch.compile(tiny.llama()), "the model that was compiled"),
    "wrapped": (lambda _: nn.DataParallel(tiny.llama()), r"its \.module"),
    "no model": (lambda _: nn.Linear(2, 2), "AutoModelForCausalLM"),
    "no weights": (lambda _: tiny.llama().to("meta"), "with its weights"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_no_causal_language_model_is_refused_with_what_to_give_instead(kind, checkpoint, recipe):
    make, message = MODELS[kind]
    with pytest.raises(UnsupportedModelError, match=message):
        prune(make(checkpoint), tiny.tokenizer(), recipe)
    with pytest.raises(UnsupportedModelError, match=message):
        evaluate(make(checkpoint), tiny.tokenizer(), recipe.calibration[0], window=32)


def test_modes_that_keep_gradients_or_sums_away_are_refused(recipe):
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        prune(tiny.llama(), tiny.tokenizer(), recipe)
    with torch.inference_mode():
        loaded = tiny.llama()
    with pytest.raises(ConfigError, match="loaded in it"):
        prune(loaded, tiny.tokenizer(), recipe)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="autocast"):
        prune(tiny.llama(), tiny.tokenizer(), recipe)


def masked(model):
    torch.nn.utils.prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)


def parametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)


def hooked(model):
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: 5 * output)


def hooked_before(model):
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _module, inputs: (2 * inputs[0],))


def shared(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def with_shared_weight(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


CHANGES = {
    masked: r"layers\.0\.mlp\.up_proj is masked .*prune\.remove",
    parametrised: r"layers\.0\.mlp\.up_proj is parametrised",
    hooked: r"layers\.0\.mlp has hooks",
    hooked_before: r"layers\.1\.mlp\.down_proj has hooks",
    shared: r"layers\.0\.mlp\.\w+ and model\.layers\.1\.mlp\.\w+ share their weights",
    with_shared_weight: r"layers\.0\.mlp\.up_proj and model\.layers\.1\.mlp\.up_proj share",
    lambda model: model.double(): r"float64.*model\.float\(\)",
}


@pytest.mark.parametrize(("change", "message"), CHANGES.items())
def test_what_no_export_would_have_is_refused_before_the_work(change, message, recipe, tmp_path):
    model = tiny.llama()
    change(model)
    with pytest.raises(UnsupportedModelError, match=message):
        prune(model, tiny.tokenizer(), recipe, out=tmp_path / "out")


def test_hooks_are_the_callers_own_where_nothing_is_exported(recipe):
    model, seen = tiny.llama(), []
    model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    prune(model, tiny.tokenizer(), recipe)
    assert seen


def test_an_output_or_a_number_of_processes_that_is_none_is_refused(recipe, checkpoint):
    with pytest.raises(ConfigError, match="The output is a int, not a path"):
        prune(tiny.llama(), tiny.tokenizer(), recipe, out=3)
    with pytest.raises(ConfigError, match="in 0 processes"):
        plan(checkpoint, recipe, processes=0)


def test_a_pattern_that_matches_nothing_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"'down_porj' to ignore matches no layer.*down_proj, "):
        prune(tiny.llama(), tiny.tokenizer(), recipe.model_copy(update={"ignore": ("lm_head", "down_porj")}))


def test_a_recipe_takes_paths(text_file):
    taken = PruneConfig(calibration=text_file, evaluation=text_file)
    assert (taken.calibration, taken.evaluation) == ((str(text_file),), (str(text_file),))


@pytest.mark.parametrize(
    ("tokenizer", "message"), [(None, "NoneType"), ("a path", "is a str"), (tiny.llama(), "Llama")]
)
def test_what_is_no_tokenizer_is_refused(tokenizer, message, recipe):
    with pytest.raises(ConfigError, match=message):
        prune(tiny.llama(), tokenizer, recipe)


def test_a_recipe_is_a_mapping_too_and_nothing_else(recipe, tmp_path):
    options = {**SMALL, "calibration": recipe.calibration}
    as_given, as_mapping = (copy.deepcopy(tiny.build("llama")) for _ in range(2))
    prune(as_given, tiny.tokenizer(), recipe)
    prune(as_mapping, tiny.tokenizer(), options)
    assert all(torch.equal(x, y) for x, y in zip(as_given.parameters(), as_mapping.parameters(), strict=True))
    for call in (
        lambda: prune(as_given, tiny.tokenizer(), "best"),
        lambda: prune_checkpoint("demo", tmp_path / "o", 0.3),
    ):
        with pytest.raises(ConfigError, match="not a PruneConfig"):
            call()


def test_a_model_in_training_mode_is_exported_and_stays_in_it(recipe, checkpoint, tmp_path):
    """As a trainer leaves it: with dropout, gradients off, results as tuples, the output a string."""
    model = LlamaForCausalLM.from_pretrained(checkpoint, attention_dropout=0.5)
    model.config.return_dict = False
    model.train()
    with torch.no_grad():
        report = prune(model, tiny.tokenizer(), recipe, out=str(tmp_path / "out"))
    assert all(module.training for module in model.modules())
    assert model.config.return_dict is False
    calm = LlamaForCausalLM.from_pretrained(checkpoint)
    assert report.shots[-1].perplexity == prune(calm, tiny.tokenizer(), recipe).shots[-1].perplexity


def test_modules_that_were_in_evaluation_mode_stay_in_it():
    model = tiny.llama().train()
    model.model.layers[0].eval()
    with ready(model):
        assert not any(module.training for module in model.modules())
    assert not model.model.layers[0].mlp.training
    assert model.model.layers[1].mlp.training


def test_an_output_that_is_there_is_refused_whatever_its_kind(recipe, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError):
        prune(tiny.llama(), tiny.tokenizer(), recipe, out=str(tmp_path / "out"))


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt-neox", "llama"])
def test_float16_models_are_pruned_and_measured_on_a_cpu(family, recipe, tmp_path):
    """Layer norms of float16 do not take the float32 that autocast makes of the stream."""
    full, half = tiny.build(family), tiny.build(family).half()
    assert evaluate(half, tiny.tokenizer(), recipe.calibration[0], window=32).nll == pytest.approx(
        evaluate(full, tiny.tokenizer(), recipe.calibration[0], window=32).nll, rel=0.02
    )
    options = {"preset": "best", "gate_steps": 1} if family == "opt" else {}
    config = PruneConfig.from_mapping({**SMALL, "calibration": recipe.calibration, **options})
    prune(half, tiny.tokenizer(), config, out=tmp_path / "out" if family == "opt" else None)
    assert half.dtype == torch.float16
    assert type(half.get_submodule("lm_head")) is nn.Linear
    assert not any("Casting" in type(module).__name__ for module in half.modules())


def test_a_float16_model_that_overflows_in_its_own_type_is_refused_before_the_work(recipe, tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3e4)
        model.model.layers[0].mlp.up_proj.weight.mul_(3e4)
    before = copy.deepcopy(model.half()).state_dict()
    with pytest.raises(NonFiniteError, match=r"up_proj overflows.*--dtype bfloat16"):
        prune(model, tiny.tokenizer(), recipe, out=tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
