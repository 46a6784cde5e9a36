"""The recipe in groups: two spellings of the same options, and what is refused with a hint."""

import re

import pytest
import yaml

from llm_surgeon import PruneConfig
from llm_surgeon.cli.compare import _variants
from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.config import read_recipe
from llm_surgeon.recipe.grouping import flat, grouped
from llm_surgeon.recipe.groups import GROUP_OF, GROUPS
from llm_surgeon.recipe.groups.calibration import CalibrationOptions
from llm_surgeon.recipe.removed import REMOVED

FLAT = {"calibration": "demo:fr", "samples": 7, "curvature": "kfac", "lora": True, "lora_rank": 3, "evaluation": "none"}
GROUPED = {
    "calibration": {"text": "demo:fr", "samples": 7},
    "curvature": {"approximation": "kfac"},
    "lora": {"enabled": True, "rank": 3},
    "evaluation": {"text": "none"},
}


def test_every_option_is_in_one_group_and_has_a_name_of_its_own_there():
    assert set(GROUP_OF) == set(PruneConfig.model_fields)
    assert sum(len(group.inner) for group in GROUPS) == len(PruneConfig.model_fields)
    for group in GROUPS:
        assert len(set(group.inner.values())) == len(group.inner)


def test_no_name_within_a_group_hides_that_of_another_kind_of_value():
    # A file is read by the names, before it is known which group they are in.
    kinds = {}
    for name, group in GROUP_OF.items():
        text = "str" in str(PruneConfig.model_fields[name].annotation)
        assert kinds.setdefault(group.inner[name], text) == text


def test_both_spellings_are_the_same_recipe():
    assert flat(GROUPED) == FLAT
    assert PruneConfig.from_mapping(GROUPED) == PruneConfig.from_mapping(FLAT) == PruneConfig(**GROUPED)
    mixed = {"calibration": {"text": "demo:fr"}, "samples": 7} | {name: FLAT[name] for name in list(FLAT)[2:]}
    assert PruneConfig.from_mapping(mixed) == PruneConfig.from_mapping(FLAT)


def test_options_in_groups_and_flat_again_are_as_before():
    resolved = PruneConfig(structure="neurons+heads", samples=9).resolved()
    assert set(grouped(resolved)) == {group.name for group in GROUPS}
    assert flat(grouped(resolved)) == resolved


def test_the_written_recipe_is_in_groups_and_the_record_is_flat():
    config = PruneConfig.from_mapping(GROUPED)
    written = yaml.safe_load(config.to_yaml())
    assert list(written) == [group.name for group in GROUPS]
    assert written["calibration"] | GROUPED["calibration"] == written["calibration"]
    assert config.resolved() | FLAT == config.resolved()
    assert PruneConfig.from_mapping(written).resolved() == config.resolved()


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("calibration: {text: 1e5, seq-len: 64}", {"calibration": "1e5", "seq_len": 64}),
        ("evaluation: {text: no}", {"evaluation": "no"}),
        ("lora:\n  enabled: true\n  batch-size: 1", {"lora": True, "lora_batch_size": 1}),
        ("calibration: 2024-01-01\nselection: {structure: 2:4}", {"calibration": "2024-01-01", "structure": "2:4"}),
        ("export:\nresources:\n  device: cpu", {"device": "cpu"}),
        ("export: {shots: [1], formats: [hf]}", {"export_shots": [1], "formats": ["hf"]}),
    ],
)
def test_files_are_read_in_both_spellings(tmp_path, content, options):
    (tmp_path / "recipe.yaml").write_text(content)
    assert read_recipe(tmp_path / "recipe.yaml") == options


def test_variants_of_a_comparison_may_have_groups():
    assert _variants(None, {"soft": {"curvature": {"dampening-g": 0.5}}}) == {"soft": {"dampening_g": 0.5}}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 3, "calibration": {"samples": 3}}, "samples twice: by itself, and as samples of the group"),
        ({"lora": {"rank": 3}, "lora_rank": 4}, "lora_rank twice: by itself, and as rank of the group lora"),
        ({"calibration": {"smaples": 3}}, "'smaples' is no option of the group calibration (did you mean samples?)"),
        ({"lora": {"lora_rank": 3}}, "'lora_rank' is no option of the group lora (did you mean rank?)"),
        ({"lora": {"device": "cpu"}}, "'device' is no option of the group lora (did you mean device of resources?)"),
        ({"evaluation": {"zzz": 3}}, "'zzz' is no option of the group evaluation."),
        ({"refit": 3}, "refit is a group of options: give a mapping, refit: {option: value}"),
        ({"calibration": {"samples": "ten"}}, "--samples has to be a whole number (got the text 'ten')"),
        ({"samples": {"text": 3}}, "--samples has to be a whole number"),
    ],
)
def test_mistakes_in_groups_are_named(options, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        PruneConfig.from_mapping(options)


def test_mistakes_in_groups_come_with_all_others():
    with pytest.raises(ConfigError, match=r"shots.*'smaples'.*'rnak'"):
        PruneConfig.from_mapping({"calibration": {"smaples": 3}, "lora": {"rnak": 3}, "shots": 0})


@pytest.mark.parametrize("name", REMOVED)
def test_a_removed_option_says_that_it_was_removed_and_what_holds(name):
    with pytest.raises(ConfigError, match=re.escape(f"the option {name} was removed: {REMOVED[name]}")):
        PruneConfig.from_mapping({name: 2})


def test_a_removed_option_is_known_in_a_group_too():
    with pytest.raises(ConfigError, match="lora_share was removed"):
        PruneConfig.from_mapping({"lora": {"share": 0.5}})


def test_a_group_stands_by_itself():
    options = CalibrationOptions(samples=3, seq_len=2048)
    assert options.sequences_per_pass == 1
    config = PruneConfig(samples=3, seq_len=2048)
    assert isinstance(config, CalibrationOptions)
    assert all(getattr(config, name) == getattr(options, name) for name in type(options).model_fields)


@pytest.mark.parametrize(
    ("options", "switch"),
    [
        ({"lora_rank": 4}, "lora"),
        ({"lora": {"final_steps": 4}}, "lora"),
        ({"reconstruction": False, "reconstruction_copies": 1}, "reconstruction"),
        ({"structure": "unstructured", "reconstruction_ridge": 0.1}, "reconstruction"),
        ({"gate_steps": 0, "gate_width": 4}, "gate_steps"),
        ({"method": "wanda", "owl_spread": 0.1}, "layer_budget"),
        ({"method": "wanda", "refine": "dsnot", "refine_reweight": "both"}, "refine"),
        ({"fisher_samples": 2}, "fisher"),
    ],
)
def test_what_has_no_effect_is_refused_with_its_switch(options, switch):
    with pytest.raises(ConfigError, match=f"has no effect while {switch} is .*: give {switch} "):
        PruneConfig.from_mapping(options)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": True, "lora_rank": 4},
        {"reconstruction_copies": 1, "gate_width": 3},
        {"preset": "fast", "structure": "2:4"},
        {"preset": "fast", "reconstruction": False},
        {"method": "wanda", "layer_budget": "owl", "owl_spread": 0.1},
        {"fisher": "true", "fisher_samples": 2},
        {"method": "magnitude"},
    ],
)
def test_what_has_an_effect_is_taken_and_so_is_a_recipe_with_every_option(options):
    resolved = PruneConfig.from_mapping(options).resolved()
    assert PruneConfig.from_mapping(resolved).resolved() == resolved
