"""Tables that can grow: a curvature, a structure, a stage or a format of one's own is a row."""

import pytest

from llm_surgeon import PruneConfig
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.expert_scores import EXPERT_SCORES
from llm_surgeon.recipe.formats import FORMATS, FormatRow
from llm_surgeon.recipe.methods import CURVATURES, METHODS, Curvature, Method, register_curvature
from llm_surgeon.recipe.stages import STAGES_KNOWN, StageRow
from llm_surgeon.recipe.structures import STRUCTURES, StructureRow


@pytest.fixture(autouse=True)
def restored_tables():
    tables = (CURVATURES, METHODS, STRUCTURES, STAGES_KNOWN, FORMATS)
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


def test_a_curvature_of_ones_own_is_a_row():
    with pytest.raises(ConfigError, match="--curvature is not known: valid are kfac"):
        PruneConfig.from_mapping({"curvature": "toy"})
    register_curvature("toy", Curvature("a toy", divisible=True), ["surgeon"])
    config = PruneConfig(curvature="toy")
    assert (config.resolved_curvature, config.steps_per_shot) == ("toy", 2)
    assert PruneConfig.from_mapping(config.resolved()) == PruneConfig.from_mapping(config.resolved())
    with pytest.raises(ConfigError, match="does not work with curvature 'toy'"):
        PruneConfig.from_mapping({"method": "l-obd", "curvature": "toy"})
    with pytest.raises(ConfigError, match=r"did you mean toy\?"):
        PruneConfig.from_mapping({"curvature": "toyy"})
    with pytest.raises(ValueError, match="the name 'toy' is taken"):
        register_curvature("toy", Curvature("another"), ["surgeon"])
    with pytest.raises(ValueError, match="'wanda' is no global method"):
        register_curvature("another", Curvature("another"), ["wanda"])
    assert "another" not in CURVATURES


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (Curvature("toy", joint=False), {"structure": "heads"}, "the toy curvature has no joint costs"),
        (Curvature("toy", subsets=False), {"max_correlations": 2}, "the toy curvature updates all together"),
        (Curvature("toy"), {"gradient_share": 0.5}, "gradient_share is for the curvature kfac, not for toy"),
        (Curvature("toy"), {"steps_per_shot": 2}, "steps_per_shot is for structures that shrink and the curvatures"),
    ],
)
def test_the_row_of_a_curvature_decides_what_goes_with_it(row, options, message):
    register_curvature("toy", row, ["surgeon"])
    with pytest.raises(ConfigError, match=message):
        PruneConfig.from_mapping({"curvature": "toy"} | options)
    CURVATURES["toy"] = Curvature("toy", divisible=True, samples_gradients=True)
    assert PruneConfig.from_mapping({"curvature": "toy"} | options).resolved_curvature == "toy"


def test_the_rows_of_curvatures_say_what_is_read():
    reads = {name: row.reads for name, row in CURVATURES.items()}
    assert reads["identity"] == "nothing"
    assert reads["activations"] == "inputs"
    inputs = {"activations", *EXPERT_SCORES}
    assert {reads[name] for name in inputs} == {"inputs"}
    assert {reads[name] for name in set(reads) - {"identity", *inputs}} == {"gradients"}


def test_a_structure_of_ones_own_is_a_row():
    with pytest.raises(ConfigError, match="--structure is not known"):
        PruneConfig.from_mapping({"structure": "toys"})
    STRUCTURES["toys"] = StructureRow("a toy", uniform=True, multiple=5, min_width=0.25)
    config = PruneConfig(structure="toys", uniform=True)
    assert (config.parts, config.widths_multiple, config.least_width) == (("toys",), 5, 0.25)
    joined = PruneConfig(structure="toys+heads")
    assert (joined.parts, joined.widths_multiple, joined.least_width) == (("toys", "heads"), 5, 0.05)
    free = PruneConfig(structure="rows-columns+toys")
    assert (free.widths_multiple, free.least_width) == (1, 0.0)
    with pytest.raises(ConfigError, match="uniform is for neurons, heads, experts, blocks and toys, not for values"):
        PruneConfig.from_mapping({"structure": "values", "uniform": True})
    with pytest.raises(ConfigError, match=r"did you mean toys\?"):
        PruneConfig.from_mapping({"structure": "toyz"})


@pytest.mark.parametrize(
    ("structure", "multiple", "width"),
    [
        ("rows-columns", 1, 0.0),
        ("neurons", 32, 0.05),
        ("heads", 1, 0.05),
        ("values", 1, 0.05),
        ("blocks", 1, 0.0),
        ("neurons+heads", 32, 0.05),
        ("neurons+blocks", 32, 0.0),
        ("rows-columns+neurons", 1, 0.0),
        ("unstructured", 1, 0.0),
        ("2:4", 1, 0.0),
    ],
)
def test_defaults_of_widths_are_those_of_the_rows(structure, multiple, width):
    config = PruneConfig(structure=structure)
    assert (config.widths_multiple, config.least_width) == (multiple, width)


@pytest.mark.parametrize(
    ("structure", "options", "message"),
    [
        ("blocks+neurons", {"uniform": True}, "uniform blocks go whole: neurons, heads and experts cannot be removed"),
        (
            "rows-columns+neurons",
            {"uniform": True},
            "uniform is for neurons, heads, experts and blocks, not for rows",
        ),
        ("2:4", {"uniform": True}, "uniform is for neurons, heads, experts and blocks, not for 2:4"),
        ("heads", {"round_to": 4}, "round_to is for structures with neurons and without rows-columns"),
        ("rows-columns+neurons", {"round_to": 4}, "round_to is for structures with neurons and without rows-columns"),
    ],
)
def test_widths_that_a_structure_cannot_have_are_refused(structure, options, message):
    with pytest.raises(ConfigError, match=message):
        PruneConfig.from_mapping({"structure": structure} | options)


def test_stages_are_names_of_a_table():
    assert PruneConfig().stages == ()
    with pytest.raises(
        ConfigError, match=r"--stage \(stages in a recipe\) has 'toy', which is not known; known are none"
    ):
        PruneConfig.from_mapping({"stages": ["toy"]})
    STAGES_KNOWN.update({"toy": StageRow("a toy"), "other": StageRow("another")})
    config = PruneConfig.from_mapping({"refit": {"stages": ["toy", "other"]}})
    assert config.stages == ("toy", "other")
    assert PruneConfig.from_mapping(config.resolved()).stages == ("toy", "other")
    with pytest.raises(
        ConfigError, match=r"has 'toyy', which is not known \(did you mean toy\?\); known are toy, other"
    ):
        PruneConfig.from_mapping({"stages": ["toyy"]})
    with pytest.raises(ConfigError, match="has 'toy' twice"):
        PruneConfig.from_mapping({"stages": ["toy", "toy"]})


def test_formats_are_names_of_a_table():
    assert PruneConfig().formats == ("hf",)
    with pytest.raises(ConfigError, match=r"--format \(formats in a recipe\) has 'toy', which is not known"):
        PruneConfig.from_mapping({"formats": ["hf", "toy"]})
    with pytest.raises(ConfigError, match="has to have one entry at least"):
        PruneConfig.from_mapping({"formats": []})
    FORMATS["toy"] = FormatRow("a toy")
    assert PruneConfig.from_mapping({"export": {"formats": ["toy"]}}).formats == ("toy",)


@pytest.mark.parametrize(
    ("options", "loop"),
    [
        ({}, "shots"),
        ({"method": "wanda"}, "layerwise"),
        ({"method": "magnitude"}, "shots"),
        ({"method": "magnitude", "scope": "row"}, "layerwise"),
    ],
)
def test_the_row_of_the_method_names_its_loop(options, loop):
    assert PruneConfig(**options).loop == loop


def test_a_method_of_ones_own_may_have_a_loop_of_its_own():
    METHODS["toy"] = Method(("identity",), False, "a toy", loop="toys")
    assert PruneConfig(method="toy").loop == "toys"
