import itertools

import pytest

from llm_surgeon.comparison.variants import SHARED, SUFFIXES, parse_methods, plan, settings_of
from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.methods import METHODS

HALF = settings_of(["unstructured"], [0.5])


def test_a_spec_is_a_method_and_what_its_suffixes_stand_for():
    assert parse_methods("surgeon, k-obd+one-shot,surgeon+one-shot+lora") == {
        "surgeon": {"method": "surgeon"},
        "k-obd+one-shot": {"method": "k-obd", "shots": 1},
        "surgeon+one-shot+lora": {"method": "surgeon", "shots": 1, "lora": True},
    }


def test_every_suffix_is_possible_with_some_method():
    for suffix in SUFFIXES:
        structures = ("unstructured", "2:4", "rows-columns")
        plans = [
            plan(parse_methods(f"{method}+{suffix}"), settings_of([structure], [0.5]), {})
            for method, structure in itertools.product(("surgeon", "wanda"), structures)
            if _possible(f"{method}+{suffix}", structure)
        ]
        assert plans
        assert all(cells[0].config is not None for cells in plans)


def _possible(spec, structure):
    try:
        PruneConfig.from_mapping({**parse_methods(spec)[spec], "structure": structure})
    except ConfigError:
        return False
    return True


def test_the_shots_of_all_are_those_of_the_global_methods():
    cells = plan(parse_methods("surgeon,wanda,magnitude,magnitude+row"), HALF, {"shots": 3})
    assert [cell.config.shots for cell in cells] == [3, 1, 3, 1]


@pytest.mark.parametrize(("spec", "message"), [("wander", "method 'wander'"), ("surgeon+magic", "suffix 'magic'")])
def test_what_is_not_known_is_named_with_what_is(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_methods(spec)
    assert all(name in caught.value.remedy for name in (*METHODS, *SUFFIXES))


def test_n_of_m_is_one_setting_and_others_go_with_every_sparsity():
    settings = settings_of(["rows-columns", "2:4", "1:4", "rows-columns"], [0.3, 0.5])
    assert [(setting.structure, setting.sparsity) for setting in settings] == [
        ("rows-columns", 0.3),
        ("rows-columns", 0.5),
        ("2:4", 0.5),
        ("1:4", 0.75),
    ]
    assert [setting.label for setting in settings] == ["rows-columns, 30 %", "rows-columns, 50 %", "2:4", "1:4"]


def test_cells_come_setting_by_setting_with_the_variants_options_before_the_common_ones():
    cells = plan({"a": {}, "b": {"shots": 1}}, settings_of(["unstructured", "2:4"], [0.5]), {"shots": 3, "seed": 4})
    assert [cell.name for cell in cells] == ["a@unstructured-0.5", "b@unstructured-0.5", "a@2-4", "b@2-4"]
    assert [(cell.config.structure, cell.config.shots, cell.config.seed) for cell in cells] == [
        ("unstructured", 3, 4),
        ("unstructured", 1, 4),
        ("2:4", 3, 4),
        ("2:4", 1, 4),
    ]


def refuse_n_of_m(monkeypatch):
    """Make the recipe refuse magnitude with N:M: of the methods of today, all work with all structures."""
    original = PruneConfig.from_mapping

    def from_mapping(values):
        if (values.get("method"), values["structure"]) == ("magnitude", "2:4"):
            raise ConfigError("magnitude does not do 2:4.", "Use another.")
        return original(values)

    monkeypatch.setattr(PruneConfig, "from_mapping", from_mapping)


def test_a_cell_that_the_recipe_refuses_is_planned_as_impossible(monkeypatch):
    refuse_n_of_m(monkeypatch)
    cells = plan(parse_methods("surgeon,magnitude"), settings_of(["unstructured", "2:4"], [0.5]), {})
    assert [cell.config is None for cell in cells] == [False, False, False, True]
    assert cells[3].refusal.cause == "magnitude does not do 2:4."


def test_what_is_possible_in_no_cell_is_an_error(monkeypatch):
    refuse_n_of_m(monkeypatch)
    two_four = settings_of(["2:4"], [])
    with pytest.raises(ConfigError, match=r"variant 'magnitude' is possible in no cell\. magnitude does not do 2:4"):
        plan(parse_methods("surgeon,magnitude"), two_four, {})
    with pytest.raises(ConfigError, match=r"setting 'unstructured, 150 %' is possible in no cell.*sparsity"):
        plan(parse_methods("surgeon,magnitude"), settings_of(["unstructured"], [0.5, 1.5]), {})


@pytest.mark.parametrize("name", [*SHARED, "structure", "sparsity", "export_shots", "weights"])
def test_a_variant_cannot_make_itself_incomparable(name):
    with pytest.raises(ConfigError, match=f"'mine' sets {name}, which"):
        plan({"mine": {name: 1}}, HALF, {})


@pytest.mark.parametrize("name", ["", "../../x", "a/b", ".hidden", "c:d"])
def test_a_variant_needs_a_name_that_a_file_can_have(name):
    with pytest.raises(ConfigError, match="a file is named after it"):
        plan({name: {}}, HALF, {})


@pytest.mark.parametrize(
    ("common", "message"),
    [
        ({"structure": "2:4"}, "structure is no option"),
        ({"export_shots": [1]}, "export_shots is no option"),
        ({"host_memory": 10**9}, "host_memory is no option"),
        ({"weights": "streamed"}, "weights is no option"),
        ({"evaluation": "none"}, "nothing to compare"),
        ({"sampels": 3}, "sampels"),
    ],
)
def test_common_options_that_make_no_comparison_are_refused(common, message):
    with pytest.raises(ConfigError, match=message):
        plan({"a": {}}, HALF, common)


@pytest.mark.parametrize(("variants", "settings"), [({}, HALF), ({"a": {}}, [])])
def test_nothing_to_compare_is_an_error(variants, settings):
    with pytest.raises(ConfigError, match="nothing to compare"):
        plan(variants, settings, {})
