import pytest
import yaml

from llm_surgeon import PruneConfig
from llm_surgeon.config import read_recipe
from llm_surgeon.errors import ConfigError


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
        ("eval_stride", 0),
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
    config = PruneConfig(sparsity=0.3, ignore=("lm_head", "layers.0.*"), eval_stride=128)
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
    with pytest.raises(ConfigError, match="--no-reconstruction"):
        PruneConfig.from_mapping({"weights": "streamed"})
    assert not PruneConfig.from_mapping({"weights": "streamed", "reconstruction": False}).cross_fit


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
