"""A structure of one's own in every place of a run, and the contract that all structures keep."""

from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from choosing import feed_forwards, masked
from extensions import twins
from extensions.runs import (
    RecordedProgress,
    interrupted_after,
    planned_by_command,
    recipe,
    restored,
    weight_files,
    write_text,
)
from extensions.structure_contract import StructureContract
from llm_surgeon import PruneConfig, prune_checkpoint
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError
from llm_surgeon.models import examine, family_of
from llm_surgeon.pruning.shapes import COUPLINGS, register_structure
from llm_surgeon.pruning.shots import run_shots
from llm_surgeon.recipe.structures import STRUCTURES
from llm_surgeon.session.session import Session
from tiny import build, tokens


@pytest.fixture(scope="module", autouse=True)
def registered():
    with restored(STRUCTURES, COUPLINGS):
        register_structure("twins", twins.ROW, twins.couplings)
        yield
    assert "twins" not in {*STRUCTURES, *COUPLINGS}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(checkpoint, text, tmp_path_factory):
    out, progress = tmp_path_factory.mktemp("run") / "out", RecordedProgress()
    config = recipe(text, structure="twins", sparsity=0.3)
    return out, prune_checkpoint(str(checkpoint), out, config, progress=progress), progress


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="the name 'twins' is taken"):
        register_structure("twins", twins.ROW, twins.couplings)


def test_a_recipe_that_it_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"uniform is for .*twins"):
        PruneConfig.from_mapping({"structure": "twins+values", "uniform": True})
    with pytest.raises(ConfigError, match=r"did you mean twins\?"):
        PruneConfig.from_mapping({"structure": "twin"})


def test_the_plan_says_what_will_be_left(checkpoint, text, tmp_path):
    plan, printed = planned_by_command(
        checkpoint, text, tmp_path / "plan.json", "--structure", "twins", "--sparsity", "0.3"
    )
    assert plan.size.prunable == round(0.7 * plan.dense_size.prunable)
    assert "gate_proj" in printed


def test_pairs_of_neurons_are_gone_from_both_blocks(run):
    _, report, progress = run
    widths = {}
    for layer in report.layers:
        if layer.kind in ("gate_proj", "up_proj"):
            widths.setdefault(layer.block, set()).add(layer.rows)
            assert layer.columns == layer.columns_dense
        elif layer.kind == "down_proj":
            widths.setdefault(layer.block, set()).add(layer.columns)
        else:
            assert layer.weights == layer.weights_dense
    assert widths[0] == widths[1]
    (width,) = widths[0]
    assert width % 4 == 0
    assert 4 <= width < 40
    assert 0.3 - 4 * 2 * 3 * 24 / report.dense_size.prunable < report.shots[-1].sparsity <= 0.3
    # Four pairs at a time, each of two columns and four rows; one side pays, the others follow.
    gone = 40 - width
    assert sum(shot.structures_removed + shot.structures_implied for shot in report.shots) == 6 * gone
    assert all(total == done for _, total, done in progress.phases)


def test_equal_widths_are_exported_as_a_plain_class(run):
    out, report, _ = run
    assert report.export.plain
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    assert loaded.num_parameters() == report.shots[-1].size.total


def test_card_and_page_name_it_in_its_own_words(run):
    out, _, _ = run
    card = (out / "README.md").read_text()
    assert "Whole pairs of neurons of the linear layers" in card
    assert "- twins" in card
    assert "structure: twins" in (out / "report.html").read_text()
    assert "structure: twins" in (out / "recipe.yaml").read_text()


def test_a_run_ended_after_a_shot_goes_on_to_the_same_bits(run, checkpoint, text, tmp_path):
    whole, expected, _ = run
    out, config = tmp_path / "out", recipe(text, structure="twins", sparsity=0.3)
    interrupted_after(1, checkpoint, out, config)
    report = prune_checkpoint(str(checkpoint), out, config)
    assert report.continued == (1,)
    assert report.layers == expected.layers
    assert weight_files(out) == weight_files(whole)


def test_the_result_computes_what_the_dense_model_does_with_zeros_for_those_neurons():
    model = build("llama")
    anatomy = examine(model, family_of("llama"))
    options: ClassVar = {"preset": "none", "structure": "twins", "sparsity": 0.3, "method": "magnitude", "shots": 2}
    session = Session(model, anatomy, CalibrationTokens(tokens(8, 16), None, {}), PruneConfig.from_mapping(options))
    *_, last = run_shots(session)
    first, second = (last.masks[part.output.layer].columns for part in feed_forwards(anatomy))
    assert torch.equal(first, second)
    assert 0 < int(first.sum()) < 40
    ids = tokens(3, 12, seed=7)
    zeros = masked(build("llama"), anatomy, last.masks)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, zeros(ids).logits, rtol=1e-4, atol=1e-5)


def test_joined_with_another_structure_each_has_its_rules(checkpoint, text, tmp_path):
    options: ClassVar = {"structure": "twins+heads", "sparsity": 0.35, "shots": 1, "evaluation": "none"}
    report = prune_checkpoint(str(checkpoint), tmp_path / "out", recipe(text, **options))
    rows = {(layer.block, layer.kind): layer.rows for layer in report.layers}
    assert rows[0, "up_proj"] == rows[1, "up_proj"]
    assert rows[0, "up_proj"] % 4 == 0
    assert {rows[block, "v_proj"] % 8 for block in (0, 1)} == {0}
    assert report.shots[-1].sparsity <= 0.35


# Of the tiny Llama: width 24, 40 neurons in each of two blocks, four heads and two key/value heads of 8 dimensions.
NEURON, GROUP, ATTENTION, FEED_FORWARD = 3 * 24, 2 * 24 * (2 * 8 + 8), 2 * 24 * (4 * 8 + 2 * 8), 3 * 24 * 40
EVERYTHING = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TestRowsAndColumns(StructureContract):
    structure = "rows-columns"
    largest = 40 + 2 * 24
    ignored = EVERYTHING


class TestNeurons(StructureContract):
    structure = "neurons"
    options: ClassVar = {"round_to": 4}
    largest = 4 * NEURON
    ignored = EVERYTHING[4:]


class TestHeads(StructureContract):
    structure = "heads"
    sparsity = 0.2
    largest = GROUP
    ignored = EVERYTHING[:4]


class TestValues(StructureContract):
    structure = "values"
    sparsity = 0.1
    largest = GROUP
    ignored = EVERYTHING[:4]


class TestBlocks(StructureContract):
    structure = "blocks"
    largest = FEED_FORWARD
    ignored = EVERYTHING


class TestNeuronsAndHeads(StructureContract):
    structure = "neurons+heads"
    options: ClassVar = {"round_to": 4}
    largest = GROUP
    ignored = EVERYTHING


class TestTwins(StructureContract):
    structure = "twins"
    largest = 4 * 2 * NEURON
    ignored = EVERYTHING[4:]
