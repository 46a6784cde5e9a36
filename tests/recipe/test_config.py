import math
import random
import re

import numpy as np
import pytest
import torch
import yaml

from llm_surgeon import PruneConfig
from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.config import differences, read_recipe
from llm_surgeon.recipe.quantity import shown


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan"), "half"])
def test_sparsity_outside_the_open_interval_is_refused(sparsity):
    with pytest.raises(ConfigError, match="sparsity"):
        PruneConfig.from_mapping({"sparsity": sparsity})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shots", 0),
        ("samples", 0),
        ("seq_len", 1),
        ("windows_per_sample", 0),
        ("windows_per_sample", 3),
        ("dampening_a", 0.0),
        ("dampening_g", -1.0),
        ("structure", "columns"),
        ("precision", "int8"),
        ("gradient_share", 0.0),
        ("gradient_share", 1.5),
        ("speed", 9),
        ("ignore", ["layers.[0"]),
    ],
)
def test_bad_values_are_named(key, value):
    with pytest.raises(ConfigError, match=key):
        PruneConfig.from_mapping({key: value})


@pytest.mark.parametrize("options", [{"curvature": "nearest-kronecker"}, {"method": "l-obd"}])
def test_only_kfac_sums_gradients_over_a_share_of_the_tokens(options):
    with pytest.raises(ConfigError, match=r"gradient_share is for the curvature kfac, not for (nearest|activations)"):
        PruneConfig.from_mapping({"gradient_share": 0.5} | options)


def test_every_problem_is_named_at_once():
    with pytest.raises(ConfigError, match=r"sparsity.*shots"):
        PruneConfig.from_mapping({"sparsity": 2, "shots": 0})


def test_schedule_is_linear_and_ends_at_the_target():
    schedule = PruneConfig(sparsity=0.5, shots=5).sparsity_schedule
    assert schedule == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ({}, 4),
        ({"seq_len": 100}, 20),
        ({"seq_len": 100, "samples": 3}, 3),
        ({"seq_len": 4096}, 1),
        ({"seq_len": 4096, "batch_size": 2}, 2),
    ],
)
def test_a_pass_is_over_2048_tokens_unless_said_otherwise(options, sequences):
    assert PruneConfig(**options).sequences_per_pass == sequences


def test_a_recipe_survives_the_round_trip():
    config = PruneConfig(sparsity=0.3, ignore=("lm_head", "layers.0.*"), eval_window=128)
    again = PruneConfig.from_mapping(yaml.safe_load(config.to_yaml()))
    assert again == config.model_copy(update={"batch_size": 4, "curvature": "kfac", "round_to": 1, "min_width": 0.0})
    assert again.to_yaml() == config.to_yaml()


def test_a_preset_stands_for_its_options():
    fast = PruneConfig(preset="fast")
    assert (fast.shots, fast.steps_per_shot, fast.reconstruction, fast.reconstruction_copies) == (1, 2, True, 0)
    assert (fast.cross_fit, fast.gate_steps) == (True, 2)
    best = PruneConfig(preset="best", structure="neurons+heads")
    assert (best.shots, best.steps_per_shot, best.reconstruction, best.reconstruction_copies) == (1, 2, True, 2)
    assert (best.cross_fit, best.gate_steps) == (True, 4)


def test_the_best_preset_is_the_default():
    assert PruneConfig() == PruneConfig(preset="best")
    assert PruneConfig(structure="2:4", seed=3) == PruneConfig(structure="2:4", seed=3, preset="best")


def test_without_a_preset_there_are_five_shots_and_nothing_is_fitted():
    config = PruneConfig(preset="none")
    assert (config.shots, config.steps_per_shot, config.reconstruction, config.gate_steps) == (5, 1, False, 0)


@pytest.mark.parametrize("method", ["k-obd", "magnitude", "wanda", "sparsegpt"])
def test_other_methods_have_no_preset(method):
    config = PruneConfig(method=method)
    assert (config.preset, config.reconstruction, config.gate_steps) == ("none", False, 0)


def test_what_is_given_beside_a_preset_holds():
    config = PruneConfig(preset="best", shots=3, reconstruction=False)
    assert (config.shots, config.reconstruction, config.cross_fit, config.gate_steps) == (3, False, False, 4)
    assert PruneConfig.from_mapping(yaml.safe_load(config.to_yaml())).resolved() == config.resolved()


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_a_preset_leaves_out_what_zeros_have_no_use_for(structure):
    config = PruneConfig(preset="fast", structure=structure)
    assert (config.shots, config.steps_per_shot, config.reconstruction, config.cross_fit) == (1, 1, False, False)
    assert config.gate_steps == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"preset": "faster"}, "'fast' or 'none'"),
        ({"preset": 1}, "'fast' or 'none'"),
        ({"preset": "fast", "method": "wanda"}, "not for wanda"),
        ({"preset": "fast", "method": "k-obd"}, "not for k-obd"),
    ],
)
def test_a_preset_that_cannot_be_is_refused(options, named):
    with pytest.raises(ConfigError, match=named):
        PruneConfig.from_mapping(options)


def test_a_preset_leaves_out_the_steps_that_a_curvature_cannot_be_divided_into():
    config = PruneConfig(curvature="kronecker-sum")
    assert (config.shots, config.steps_per_shot, config.reconstruction, config.cross_fit) == (1, 1, True, True)


def test_streamed_weights_say_which_option_they_cannot_go_with():
    with pytest.raises(ConfigError, match="lora"):
        PruneConfig.from_mapping({"weights": "streamed", "lora": True, "structure": "unstructured"})
    assert PruneConfig.from_mapping({"weights": "streamed"}).reconstruction


def test_recipes_take_hyphens_and_may_be_empty(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("seq-len: 64\n")
    assert read_recipe(path) == {"seq_len": 64}
    path.write_text("# nothing yet\n")
    assert read_recipe(path) == {}


@pytest.mark.parametrize("content", ["- a\n- list\n", "a: [unclosed\n", None])
def test_unreadable_recipes_are_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"recipe\.yaml"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": "yes"}, "--samples has to be a whole number (got the text 'yes')"),
        ({"samples": True}, "--samples has to be a whole number (got True)"),
        ({"samples": "5"}, "--samples has to be a whole number (got the text '5')"),
        ({"samples": 3.0}, "--samples has to be a whole number (got 3.0)"),
        ({"seed": math.inf}, "--seed has to be a whole number (got inf)"),
        ({"sparsity": True}, "--sparsity has to be a number (got True)"),
        ({"sparsity": "0.3"}, "--sparsity has to be a number (got the text '0.3')"),
        ({"sparsity": math.nan}, "--sparsity has to be a finite number (got nan)"),
        ({"target_latency": math.inf}, "(target_latency in a recipe) has to be a finite number (got inf)"),
        ({"lora": "yes"}, "--lora or --no-lora (lora in a recipe) has to be true or false (got the text 'yes')"),
        ({"cross_fit": 1}, "--cross-fit or --no-cross-fit (cross_fit in a recipe) has to be true or false (got 1)"),
        ({"structure": 124}, "--structure has to be text (got 124)"),
        ({"calibration": ""}, "--calibration has to be text (got '')"),
        ({"calibration": "\ud800"}, r"--calibration has to be text without broken characters (got '\ud800')"),
        ({"ignore": "lm_head"}, "--ignore has to be a list (got 'lm_head')"),
        ({"ignore": [3]}, "--ignore has to be text (got 3)"),
        ({"ignore": ["a{99999999999}"]}, "--ignore has 'a{99999999999}', which is no regular expression"),
        ({"export_shots": [True]}, "(export_shots in a recipe) has to be a whole number (got True)"),
        ({"target_params": "1:30"}, "(target_params in a recipe) is no positive number"),
        ({"target_bytes": True}, "is no positive number with or without K, M, G, Ki, Mi or Gi (got True)"),
        ({"fisher": True}, "--fisher has to be 'empirical' or 'true' (got True)"),
        ({"eval_window": 1}, "--eval-window (eval_window in a recipe) has to be at least 2 (got 1)"),
        ({"dampening_a": 0.0}, "--dampening-a (dampening_a in a recipe) has to be more than 0 (got 0.0)"),
    ],
    ids=shown,
)
def test_what_is_not_of_the_kind_of_an_option_is_refused_with_its_name(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        PruneConfig.from_mapping(options)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"sparsity": np.float32(0.25)}, 0.25),
        ({"sparsity": np.float64(0.3)}, 0.3),
        ({"dampening_a": 1}, 1.0),
        ({"seed": np.int64(3)}, 3),
        ({"target_params": np.int64(3)}, 3),
        ({"target_params": "90M"}, 90_000_000),
        ({"ignore": ["a"]}, ("a",)),
        ({"export_shots": [1]}, (1,)),
    ],
    ids=shown,
)
def test_python_gives_numbers_of_numpy_and_lists(options, value):
    ((name, given),) = options.items()
    found = getattr(PruneConfig(**{name: given}), name)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("options", "meant"),
    [
        ({"sparsity": 30}, "0.3"),
        ({"sparsity": 50.0}, "0.5"),
        ({"sparsity": "30%"}, "0.3"),
        ({"sparsity": " 12.5 % "}, "0.125"),
        ({"min_width": 5}, "0.05"),
        ({"reconstruction_share": 50}, "0.5"),
        ({"owl_spread": 8}, "0.08"),
        ({"method": "surgoen"}, "surgeon"),
        ({"structure": "neuron+head"}, "neurons+heads"),
        ({"structure": "unstructred"}, "unstructured"),
        ({"dtype": "BF16"}, "bfloat16"),
        ({"preset": "fats"}, "fast"),
        ({"curvature": "nearest_kronecker"}, "nearest-kronecker"),
        ({"scope": "rows"}, "row"),
        ({"sparcity": 0.3}, "sparsity"),
        ({"evalwindow": 3}, "eval_window"),
    ],
    ids=shown,
)
def test_what_may_have_been_meant_is_asked(options, meant):
    with pytest.raises(ConfigError, match=rf"did you mean {re.escape(meant)}\?\)"):
        PruneConfig.from_mapping(options)


@pytest.mark.parametrize(
    "options",
    [
        *({"sparsity": value} for value in (150, 1, 1.5, 0, -30, "100%", "-3%", "%", 10**5000)),
        # No fractions.
        *({"dampening_a": "1%"}, {"score_norm": "30%"}, {"shots": 0}),
        *({"structure": "zzz"}, {"structure": "neurons+zzz"}, {"method": ""}, {"zzz": 1}),
    ],
    ids=shown,
)
def test_nothing_is_suggested_where_nothing_is_like_it(options):
    with pytest.raises(ConfigError) as caught:
        PruneConfig.from_mapping(options)
    assert "did you mean" not in str(caught.value)


def test_an_unknown_option_is_not_answered_with_all_that_are_known():
    with pytest.raises(ConfigError, match=r"'sparcity' is no option \(did you mean sparsity\?\)") as caught:
        PruneConfig.from_mapping({"sparcity": 0.3})
    assert len(str(caught.value)) < 150
    assert caught.value.remedy == "`llm-surgeon prune --help-all` explains each option."


def test_options_that_do_not_go_together_come_with_their_spelling_on_the_command_line():
    with pytest.raises(ConfigError, match=r"30 tokens \(seq_len\)") as caught:
        PruneConfig.from_mapping({"seq_len": 30, "windows_per_sample": 7})
    assert caught.value.remedy.startswith("On the command line: --seq-len, --windows-per-sample. ")
    with pytest.raises(ConfigError, match="cross_fit is for reconstruction") as caught:
        PruneConfig.from_mapping({"preset": "none", "cross_fit": True})
    assert caught.value.remedy.startswith("On the command line: --cross-fit or --no-cross-fit. ")


COUNTS = [name for name, field in PruneConfig.model_fields.items() if "int" in str(field.annotation)]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [10**30, 10**5000], ids=shown)
def test_no_count_is_beyond_all_measure(name, value):
    with pytest.raises(ConfigError, match=f"{name.replace('_', '-')}|{name}") as caught:
        PruneConfig.from_mapping({name: [value] if name == "export_shots" else value})
    assert len(caught.value.cause) < 300


@pytest.mark.parametrize(
    ("name", "most", "message"),
    [
        ("shots", 10_000, "at most 10,000"),
        ("steps_per_shot", 10_000, "at most 10,000"),
        ("samples", 10**9, "at most 1,000,000,000"),
        ("seed", 2**63 - 1, "at most 9,223,372,036,854,775,807"),
        ("target_params", 10**18, r"is more than 10\^18"),
    ],
)
def test_the_largest_counts_are_taken_and_named(name, most, message):
    assert getattr(PruneConfig(**{name: most}), name) == most
    with pytest.raises(ConfigError, match=message):
        PruneConfig.from_mapping({name: most + 1})


def test_the_largest_seed_is_one_for_random_and_torch():
    seed = PruneConfig(seed=2**63 - 1).seed + PruneConfig(preset="none", shots=10_000).shots
    assert torch.Generator().manual_seed(seed).initial_seed() == seed
    assert random.Random(seed).random() != random.Random(0).random()


def test_messages_are_short_whatever_the_values_are():
    bomb = ["x"]
    for _ in range(50):
        bomb = [bomb] * 9
    for options in (
        {name: bomb for name in PruneConfig.model_fields},  # noqa: C420  (each with its own problem)
        {f"{'k' * 1000}{number}": bomb for number in range(10_000)},
        {"ignore": ["(" * 1000] * 10_000},
        {"calibration": 10**5000, "structure": "+".join(["heads"] * 10_000)},
        {"export_shots": list(range(10_000))},
    ):
        with pytest.raises(ConfigError) as caught:
            PruneConfig.from_mapping(options)
        assert len(str(caught.value)) < 1500
    (line,) = differences({"ignore": bomb}, {"ignore": 10**5000})
    assert line.startswith("ignore was [[[")
    assert line.endswith("is a number of about 5,001 digits")
    assert len(line) < 200


def test_what_is_no_mapping_is_refused():
    for values in ([1], None, "x", {1: 2}, {"\ud800": 1}):
        with pytest.raises(ConfigError):
            PruneConfig.from_mapping(values)


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        ("structure: 2:4", {"structure": "2:4", "sparsity": 0.5}),
        ("structure: 1:4", {"structure": "1:4", "sparsity": 0.75}),
        ("fisher: true\nfisher-samples: 3", {"fisher": "true", "fisher_samples": 3}),
        ("target-params: 90M", {"target_params": 90_000_000}),
        ("lora: true\nsamples: 010\nevaluation: ~", {"lora": True, "samples": 10, "evaluation": None}),
    ],
)
def test_recipes_are_read_as_they_are_meant(tmp_path, recipe, found):
    (tmp_path / "recipe.yaml").write_text(recipe)
    config = PruneConfig.from_mapping(read_recipe(tmp_path / "recipe.yaml"))
    assert {name: getattr(config, name) for name in found} == found


@pytest.mark.parametrize(
    "value", ["yes", "true", "'5'", "5.0", "1e2", "1e400", "0o17", "0x1f", "1_000", "2024-01-01", ".nan", "9" * 5000]
)
def test_recipes_with_what_is_no_count_are_refused(tmp_path, value):
    (tmp_path / "recipe.yaml").write_text(f"samples: {value}")
    with pytest.raises(ConfigError, match="--samples has to be a whole number"):
        PruneConfig.from_mapping(read_recipe(tmp_path / "recipe.yaml"))
