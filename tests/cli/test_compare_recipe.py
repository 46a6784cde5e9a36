"""What the recipe of a comparison may hold: lists of settings, and variants."""

import math

import pytest

from llm_surgeon.cli.compare import _listed, _variants
from llm_surgeon.comparison.variants import parse_methods, plan, settings_of
from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.config import read_recipe


def test_settings_of_a_recipe_are_lists_or_single_values():
    options = {"structure": ["2:4", "heads"], "sparsity": 0.3, "seed": 1}
    assert _listed(options, "structure", "unstructured") == ["2:4", "heads"]
    assert _listed(options, "sparsity", 0.5) == [0.3]
    assert options == {"seed": 1}
    assert _listed(options | {"structure": None}, "structure", "unstructured") == ["unstructured"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": ["2:4", 124]}, r"--structure has to be text \(got 124\)"),
        ({"structure": {"a": 1}}, "--structure has to be text"),
        ({"structure": ["colums"]}, "did you mean rows-columns"),
        ({"sparsity": [0.3, 50]}, r"--sparsity has to be less than 1 \(got 50; did you mean 0.5\?\)"),
        ({"sparsity": ["30%"]}, r"--sparsity has to be a number \(got the text '30%'; did you mean 0.3\?\)"),
        ({"sparsity": True}, "--sparsity has to be a number"),
        ({"sparsity": [math.nan]}, "--sparsity has to be a finite number"),
        ({"sparsity": [[0.5]]}, "--sparsity has to be a number"),
        ({"sparsity": [0.5, None]}, "sparsity is nothing"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(options, message):
    (name,) = options
    with pytest.raises(ConfigError, match=message):
        _listed(options, name, None)


def test_variants_are_read_as_recipes_are(tmp_path):
    recipe = "structure: 2:4\nvariants:\n  soft-true: {fisher: true, cross-fit: false}\n  b: {samples: yes}\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    options = read_recipe(tmp_path / "recipe.yaml")
    variants = _variants("wanda", options["variants"])
    assert variants == {
        "wanda": {"method": "wanda"},
        "soft-true": {"fisher": "true", "cross_fit": False},
        "b": {"samples": "yes"},
    }
    assert settings_of(_listed(options, "structure", None), [0.3])[0].label == "2:4"


@pytest.mark.parametrize("more", [["a"], {"a": None}, {"a": 3}, "a", 3])
def test_variants_that_are_none_are_refused(more):
    with pytest.raises(ConfigError, match="not a mapping of names to options"):
        _variants(None, more)


def test_what_is_not_known_is_asked_after_and_cut():
    with pytest.raises(ConfigError, match=r"method 'surgoen' .* is not known \(did you mean surgeon\?\)"):
        parse_methods("surgoen+lora")
    with pytest.raises(ConfigError, match=r"suffix 'reconstructoin' .* \(did you mean reconstruction\?\)"):
        parse_methods("surgeon+reconstructoin")
    with pytest.raises(ConfigError, match="The method 'xxx") as caught:
        parse_methods("x" * 100_000)
    assert len(caught.value.cause) < 250
    with pytest.raises(ConfigError, match="A variant cannot be named 'xxx") as caught:
        plan({"x" * 100_000: {}}, settings_of(["heads"], [0.5]), {})
    assert len(caught.value.cause) < 250


def test_what_all_have_in_common_is_for_those_whose_switch_is_on():
    variants = {"wanda": {"method": "wanda"}, "wanda+owl": {"method": "wanda", "layer_budget": "owl"}}
    plain, owl = plan(variants, settings_of(["unstructured"], [0.5]), {"owl_spread": 0.2})
    assert plain.config.owl_spread == 0.08
    assert owl.config.owl_spread == 0.2
