"""A stage of one's own in every place of a run, and the contract that all stages keep."""

import json
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open

from extensions.centre import Centre, places_of, rows_of
from extensions.runs import (
    RecordedProgress,
    interrupted_after,
    planned_by_command,
    recipe,
    restored,
    weight_files,
    write_text,
)
from extensions.stage_contract import StageContract
from llm_surgeon import prune_checkpoint
from llm_surgeon.errors import ConfigError
from llm_surgeon.recipe.stages import STAGES_KNOWN
from llm_surgeon.records import PruneReport
from llm_surgeon.refit.gates_stage import GatesStage
from llm_surgeon.refit.lora_stage import CorrectionStage
from llm_surgeon.refit.reconstruction_stage import ReconstructionStage
from llm_surgeon.refit.stages import STAGES, register_stage

FIGURES = ("error of outputs before", "error of outputs after")


@pytest.fixture(scope="module", autouse=True)
def registered():
    with restored(STAGES, STAGES_KNOWN):
        register_stage(Centre, "one number a layer towards the dense model's outputs")
        yield
    assert "centre" not in {*STAGES, *STAGES_KNOWN}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def run(checkpoint, text, tmp_path_factory):
    """A run with the stage: its export, report and progress."""
    out, progress = tmp_path_factory.mktemp("run") / "out", RecordedProgress()
    return out, prune_checkpoint(str(checkpoint), out, recipe(text, stages=["centre"]), progress=progress), progress


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="the name 'centre' is taken"):
        register_stage(Centre, "again")


def test_the_plan_has_its_time_and_memory(checkpoint, text, tmp_path):
    plan, printed = planned_by_command(checkpoint, text, tmp_path / "plan.json", "--stage", "centre")
    (phase,) = (phase for phase in plan.phases if phase.name == "centre")
    assert "centre" in printed
    assert phase.seconds > 0
    assert phase.host["passes"] > 0
    assert phase.host["dense weights for stages"] == 4 * plan.dense_size.prunable
    without, _ = planned_by_command(checkpoint, text, tmp_path / "without.json")
    assert "centre" not in [phase.name for phase in without.phases]
    assert without.disk < plan.disk, "the norms are in the checkpoints"


def test_progress_shows_it_in_each_shot(run):
    _, _, progress = run
    tokens, places = 8 * 16, 2 * (7 + 2)
    assert progress.of("centre") == [
        (f"shot {shot}/2: centre", 2 * tokens * places, 2 * tokens * places) for shot in (1, 2)
    ]


def test_its_figures_are_in_report_and_page(run):
    out, report, _ = run
    written = PruneReport.model_validate_json((out / "report.json").read_text())
    assert [shot.stages for shot in written.shots] == [shot.stages for shot in report.shots]
    for shot in report.shots:
        stage = shot.stage("centre")
        before, after = (stage[name] for name in FIGURES)
        assert 0 < after < before
        assert stage.seconds > 0
        assert stage.peak > 0
        assert [record.name for record in shot.stages] == ["curvature", "selection", "update", "centre", "evaluation"]
    page = (out / "report.html").read_text()
    assert all(f">{name}<" in page for name in FIGURES)
    assert "each given the layers before it" in page
    assert json.loads((out / "report.json").read_text())["config"]["stages"] == ["centre"]
    assert "- centre" in (out / "recipe.yaml").read_text()


def test_a_run_ended_after_a_shot_goes_on_to_the_same_bits(run, checkpoint, text, tmp_path):
    whole, expected, _ = run
    out, config = tmp_path / "out", recipe(text, stages=["centre"])
    interrupted_after(1, checkpoint, out, config)
    with safe_open(tmp_path / "out.run" / "shot-1.safetensors", framework="pt") as file:
        stored = {name for name in file.keys() if name.endswith("layernorm.weight")}  # noqa: SIM118  # no dictionary
    assert len(stored) == 4
    report = prune_checkpoint(str(checkpoint), out, config)
    assert report.continued == (1,)
    assert weight_files(out) == weight_files(whole)
    assert [shot.stage("centre").figures for shot in report.shots] == [
        shot.stage("centre").figures for shot in expected.shots
    ]


def test_each_half_begins_with_the_same_model_and_the_result_is_the_mean(checkpoint, text, tmp_path, monkeypatch):
    fit, norms, progress = Centre.fit, [], RecordedProgress()
    name = "model.layers.1.input_layernorm.weight"

    def watched(self, shot, half, advance):
        before = self.session.model.get_parameter(name).clone()
        found = fit(self, shot, half, advance)
        norms.append((before, self.session.model.get_parameter(name).clone()))
        return found

    monkeypatch.setattr(Centre, "fit", watched)
    options: ClassVar = {"stages": ["centre"], "reconstruction": True, "cross_fit": True, "shots": 1}
    out = tmp_path / "out"
    report = prune_checkpoint(str(checkpoint), out, recipe(text, **options), progress=progress)
    (first, one), (second, other) = norms
    assert torch.equal(first, second)
    assert not torch.equal(one, other)
    with safe_open(out / "model.safetensors", framework="pt") as file:
        torch.testing.assert_close(file.get_tensor(name), (one + other) / 2)
    assert [phase[0] for phase in progress.of(": centre")] == [
        f"shot 1/1: centre by half {half} of 2" for half in (1, 2)
    ]
    assert all(total == done for _, total, done in progress.phases)
    assert report.shots[0].stage("centre")["error of outputs after"] > 0


def test_weights_that_come_block_by_block_are_refused(checkpoint, text, tmp_path):
    config = recipe(text, stages=["centre"], weights="streamed")
    with pytest.raises(ConfigError, match=r"stage centre needs all weights.*leave centre out"):
        prune_checkpoint(str(checkpoint), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


class TestCentre(StageContract):
    stage = Centre
    options: ClassVar = {"stages": ["centre"]}

    def test_no_other_number_makes_a_layer_nearer_to_the_dense_one(self):
        session, shot, _ = self.fitted()
        before, _ = self.pruned()
        stage = Centre(session)
        changed = 0
        for name in places_of(session.anatomy):
            product, own, wanted = stage._sums(name, rows_of(shot, name), None, lambda _tokens: None)
            assert own == pytest.approx(product, rel=1e-5), "the parabola of its scale has its minimum at one"
            assert own - 2 * product + wanted <= wanted
            changed += not torch.equal(
                session.model.state_dict().get(f"{name}.weight", torch.ones(1)),
                before.model.state_dict().get(f"{name}.weight", torch.ones(1)),
            )
        assert changed > 0


class TestReconstruction(StageContract):
    stage = ReconstructionStage
    options: ClassVar = {"reconstruction": True, "reconstruction_copies": 1}
    elements = False
    # The plan takes what is read of a block's float32 weights for a part of each batch's hidden states.
    planned_to_real = (0.95, 3.5)


class TestGates(StageContract):
    stage = GatesStage
    options: ClassVar = {"gate_steps": 1}


class TestCorrection(StageContract):
    stage = CorrectionStage
    options: ClassVar = {
        "lora": True,
        "lora_steps": 2,
        "lora_final_steps": 2,
        "lora_batch_size": 2,
        "lora_learning_rate": 1e-2,
    }
