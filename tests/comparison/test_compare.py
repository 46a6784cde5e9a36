import json
import signal
import sys

import pytest
import torch

from llm_surgeon import Comparison, PruneConfig, Setting, compare, load, prune
from llm_surgeon.comparison import cell_process as process
from llm_surgeon.comparison import compare as comparison_module
from llm_surgeon.comparison.cell_process import CellAnswer, CellOrder, work, work_in_process
from llm_surgeon.data.texts import prepare_texts
from llm_surgeon.errors import ComparisonError, ConfigError, OutputError
from llm_surgeon.evaluation.divergence import perplexity_and_divergence, reference_states

SMALL = {"samples": 8, "seq_len": 32, "eval_window": 64, "eval_tokens": 512, "shots": 2, "precision": "float32"}
HALF = Setting(structure="unstructured", sparsity=0.5)
TWO_FOUR = Setting(structure="2:4", sparsity=0.5)
SURGEON, MAGNITUDE = {"surgeon": {}}, {"magnitude": {"method": "magnitude"}}
BROKEN = {"broken": {"ignore": ["."]}}


@pytest.fixture
def tasks(monkeypatch):
    """Does the work in this process, which is quick; gives the tasks that were done."""
    done = []

    def here(task):
        done.append("dense" if task.dense else f"{task.recipe['method']} {task.recipe['structure']}")
        return work(task)

    monkeypatch.setattr(comparison_module, "work_in_process", here)
    return done


@pytest.fixture
def run(checkpoint, text_file, tmp_path, tasks):
    def run(variants, settings=(HALF,), **changes):
        common = {**SMALL, "calibration": str(text_file), **changes}
        return compare(str(checkpoint), tmp_path / "out", variants, settings, common)

    return run


def cell(comparison, variant, setting=HALF):
    (found,) = [cell for cell in comparison.cells if (cell.variant, cell.setting) == (variant, setting)]
    return found


@pytest.mark.parametrize(
    ("structure", "sparsity"), [("unstructured", 0.5), ("rows-columns", 0.3)], ids=["zeros", "smaller"]
)
def test_numbers_are_those_of_a_run_of_its_own(run, checkpoint, text_file, structure, sparsity):
    setting = Setting(structure=structure, sparsity=sparsity)
    result = run(SURGEON, [setting])
    config = PruneConfig.from_mapping(
        {**SMALL, "preset": "none", "calibration": str(text_file), **setting.model_dump()}
    )
    model, tokenizer = load(checkpoint, device="cpu")
    text = prepare_texts(tokenizer, config).evaluation
    dense, states = reference_states(model, text)
    report = prune(model, tokenizer, config)
    measures = cell(result, "surgeon", setting).measures
    assert result.dense.perplexity == report.dense_perplexity == dense
    assert measures.perplexity == report.shots[-1].perplexity
    assert measures.divergence == perplexity_and_divergence(model, text, states)[1] > 0
    assert measures.sparsity == pytest.approx(report.shots[-1].sparsity)
    assert measures.calibration == report.calibration
    assert measures.seconds > 0
    assert measures.peak > 0


def test_the_divergence_is_of_the_predictions_also_where_channels_were_reordered(run, checkpoint, text_file):
    options = {"method": "wanda", "permute": True}
    measures = cell(run({"permuted": options}, [TWO_FOUR]), "permuted", TWO_FOUR).measures
    config = PruneConfig.from_mapping(
        {**SMALL, "shots": 1, "calibration": str(text_file), **options, **TWO_FOUR.model_dump()}
    )
    (dense, tokenizer), (pruned, _) = load(checkpoint, device="cpu"), load(checkpoint, device="cpu")
    text = prepare_texts(tokenizer, config).evaluation
    prune(pruned, tokenizer, config)
    assert not torch.equal(pruned.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    windows = torch.stack([text.tokens[start : start + 64] for start, _ in text.windows])
    with torch.no_grad():
        expected, actual = (model(windows).logits[:, :-1].log_softmax(-1) for model in (dense, pruned))
    assert measures.divergence == pytest.approx(float((expected.exp() * (expected - actual)).sum(-1).mean()), rel=1e-4)


def test_sparsity_is_counted_in_the_weights(run, monkeypatch):
    """Weights that became zero without the run's knowledge count."""
    from llm_surgeon.comparison import cell as cell_module

    def with_a_zero_layer(job):
        result = original(job)
        job.model.model.layers[0].mlp.up_proj.weight.data.zero_()
        return result

    original = cell_module.run_job
    plain = cell(run(MAGNITUDE), "magnitude").measures.sparsity
    monkeypatch.setattr(cell_module, "run_job", with_a_zero_layer)
    more = cell(run({"zeroed": {"method": "magnitude"}}), "zeroed").measures.sparsity
    assert plain == pytest.approx(0.5, abs=1e-3)
    assert more > plain + 0.02


def test_all_cells_see_the_same_tokens_and_a_directory_holds_everything(run, tmp_path, tasks):
    result = run(SURGEON | MAGNITUDE, [HALF, TWO_FOUR])
    assert tasks == ["dense", "surgeon unstructured", "magnitude unstructured", "surgeon 2:4", "magnitude 2:4"]
    assert all(cell.measures.calibration == result.dense.calibration for cell in result.cells)
    out = tmp_path / "out"
    assert {str(path.relative_to(out)) for path in out.rglob("*.*")} == {
        "comparison.json",
        "comparison.md",
        "comparison.png",
        *(f"cells/{name}@{setting}.json" for name in SURGEON | MAGNITUDE for setting in ("unstructured-0.5", "2-4")),
    }, "the hidden states go when all is finished"
    assert Comparison.model_validate_json((out / "comparison.json").read_text()) == result
    assert json.loads((out / "cells" / "surgeon@2-4.json").read_text()) == result.cells[2].model_dump(mode="json")
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_not_run_again(run, tasks, tmp_path):
    first = run(SURGEON)
    kept = tmp_path / "out" / "cells" / "surgeon@unstructured-0.5.json"
    before = kept.stat().st_mtime_ns
    tasks.clear()
    assert run(SURGEON).cells == first.cells
    assert tasks == []
    assert kept.stat().st_mtime_ns == before
    second = run(MAGNITUDE)
    assert tasks == ["dense", "magnitude unstructured"], "the dense model's hidden states are needed again"
    assert [cell.variant for cell in second.cells] == ["magnitude", "surgeon"], "earlier results stay in the table"
    assert cell(second, "surgeon") == cell(first, "surgeon")


def test_a_cell_that_fails_is_reported_tried_again_and_costs_no_other(run, tasks, tmp_path):
    first = run(BROKEN | MAGNITUDE)
    assert cell(first, "broken").status == "failed"
    assert "match every layer" in cell(first, "broken").failure.cause
    assert cell(first, "magnitude").status == "finished"
    assert "match every layer" in (tmp_path / "out" / "comparison.md").read_text()
    assert (tmp_path / "out" / "dense.safetensors").exists()
    tasks.clear()
    second = run({"broken": {}} | MAGNITUDE)
    assert tasks == ["surgeon unstructured"], "neither the dense model nor the finished cell is measured again"
    assert cell(second, "broken").status == "finished"
    assert not (tmp_path / "out" / "dense.safetensors").exists()


def test_an_error_that_nobody_foresaw_is_a_failed_cell_with_its_stack_trace(run, monkeypatch):
    def explode(*_):
        raise RuntimeError("no such luck")

    monkeypatch.setattr("llm_surgeon.comparison.cell.run_job", explode)
    failure = cell(run(SURGEON), "surgeon").failure
    assert failure.cause == "RuntimeError: no such luck"
    assert "in explode" in failure.trace


def test_an_interrupt_keeps_what_is_finished(run, tasks, monkeypatch):
    done = comparison_module.work_in_process

    def interrupted(task):
        if task.recipe["method"] == "magnitude":
            raise KeyboardInterrupt
        return done(task)

    monkeypatch.setattr(comparison_module, "work_in_process", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(SURGEON | MAGNITUDE)
    monkeypatch.setattr(comparison_module, "work_in_process", done)
    tasks.clear()
    assert [cell.status for cell in run(SURGEON | MAGNITUDE).cells] == ["finished", "finished"]
    assert tasks == ["magnitude unstructured"]


def test_what_the_recipe_refuses_is_on_record_and_not_run(run, tasks, monkeypatch):
    original = PruneConfig.from_mapping

    def from_mapping(values):
        if (values.get("method"), values.get("structure")) == ("magnitude", "2:4"):
            raise ConfigError("magnitude does not do 2:4.", "Use another.")
        return original(values)

    monkeypatch.setattr(PruneConfig, "from_mapping", from_mapping)
    result = run(SURGEON | MAGNITUDE, [HALF, TWO_FOUR])
    assert [cell.status for cell in result.cells] == ["finished", "finished", "finished", "impossible"]
    assert "magnitude 2:4" not in tasks


class TestRefusals:
    """Each before any work, and nothing that is there is touched."""

    def test_other_options_of_all_cells(self, run, tasks):
        run(SURGEON)
        tasks.clear()
        with pytest.raises(ComparisonError, match="samples was 8 and is 9") as caught:
            run(MAGNITUDE, samples=9)
        assert "another --out" in caught.value.remedy
        assert tasks == []

    def test_another_recipe_of_the_same_name(self, run, tasks):
        run(SURGEON)
        tasks.clear()
        with pytest.raises(ComparisonError, match=r"surgeon@unstructured-0.5 .*dampening_g was 0.1 and is 0.3"):
            run({"surgeon": {"dampening_g": 0.3}})
        assert tasks == []

    def test_another_model(self, run, tmp_path, text_file):
        run(SURGEON)
        with pytest.raises(ComparisonError, match="model was"):
            compare("other", tmp_path / "out", SURGEON, [HALF], {**SMALL, "calibration": str(text_file)})

    def test_a_directory_that_is_no_comparison(self, run, tmp_path, tasks):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("irreplaceable")
        with pytest.raises(OutputError, match="not empty"):
            run(SURGEON)
        assert tasks == []

    def test_a_damaged_record(self, run, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "comparison.json").write_text("{")
        with pytest.raises(OutputError, match="cannot be read as part of a comparison"):
            run(SURGEON)

    def test_a_text_that_has_changed(self, run, text_file):
        run(SURGEON)
        text_file.write_text(text_file.read_text().replace("w1 ", "w2 "))
        with pytest.raises(ComparisonError, match="not what it was"):
            run(MAGNITUDE)

    def test_a_dense_model_that_cannot_be_measured_leaves_nothing(self, run, tmp_path):
        with pytest.raises(ComparisonError, match=r"missing.txt"):
            run(SURGEON, calibration="missing.txt")
        assert not (tmp_path / "out").exists()


def test_a_record_from_before_an_option_existed_had_its_default(run, tmp_path, tasks):
    run(SURGEON)
    path = tmp_path / "out" / "cells" / "surgeon@unstructured-0.5.json"
    content = json.loads(path.read_text())
    del content["recipe"]["update_steps"]
    path.write_text(json.dumps(content))
    tasks.clear()
    run(SURGEON)
    assert tasks == []
    with pytest.raises(ComparisonError, match="update_steps was 20 and is 3"):
        run({"surgeon": {"update_steps": 3}})


class TestProcess:
    """The process itself, and what becomes of its accidents."""

    TASK = CellOrder(model="m", recipe={}, reference="r")

    def run_instead(self, monkeypatch, code):
        monkeypatch.setattr(process, "command", lambda _order, answer: [sys.executable, "-c", code, str(answer)])
        return work_in_process(self.TASK).failure

    def test_it_answers_as_the_work_here_does(self, checkpoint, text_file, tmp_path):
        config = PruneConfig.from_mapping({**SMALL, "calibration": str(text_file)})
        recipe = config.resolved()
        task = CellOrder(model=str(checkpoint), recipe=recipe, reference=str(tmp_path / "apart"), dense=True)
        here = work(task.model_copy(update={"reference": str(tmp_path / "here")}))
        assert work_in_process(task) == here
        assert here.dense is not None
        assert (tmp_path / "apart").stat().st_size == (tmp_path / "here").stat().st_size > 0

    def test_a_killed_process_has_probably_run_out_of_memory(self, monkeypatch):
        code = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
        failure = self.run_instead(monkeypatch, code)
        assert "killed (SIGKILL), probably because memory ran out" in failure.cause
        assert "batch_size" in failure.remedy

    @pytest.mark.parametrize(
        ("code", "cause"),
        [
            (f"import os; os.kill(os.getpid(), {int(signal.SIGTERM)})", "ended by SIGTERM"),
            ("raise SystemExit(3)", "exit status 3"),
            ("pass", "exit status 0"),
        ],
    )
    def test_a_process_without_an_answer_is_a_failure(self, monkeypatch, code, cause):
        assert cause in self.run_instead(monkeypatch, code).cause

    def test_what_it_prints_is_kept_from_standard_output(self, monkeypatch, capfd):
        answer = CellAnswer(failure={"cause": "c", "remedy": "r"}).model_dump_json()
        code = f"import sys; print('chatter'); open(sys.argv[1], 'w').write({answer!r})"
        assert self.run_instead(monkeypatch, code).cause == "c"
        captured = capfd.readouterr()
        assert captured.out == ""
        assert "chatter" in captured.err
