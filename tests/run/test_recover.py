"""Recovery of exports: in every form, to the same end however it is interrupted, and never worse than before."""

import contextlib
import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from llm_surgeon import (
    PruneConfig,
    RecoverConfig,
    Setting,
    compare,
    evaluate,
    load,
    plan,
    prune,
    prune_checkpoint,
    recover,
)
from llm_surgeon.cli import app
from llm_surgeon.cli.recover import _how_to_go_on
from llm_surgeon.errors import (
    ConfigError,
    DataError,
    ExportMismatchError,
    NonFiniteError,
    OutputError,
    RecoveryError,
    UnsupportedModelError,
)
from llm_surgeon.export.verify import ReloadCheck, verify_export
from llm_surgeon.records import PruneReport, RecoveryRecord
from llm_surgeon.recovery import opening, training, writing
from llm_surgeon.run import recovery_report
from quick import without_what_has_other_tests
from stored_towers import assert_the_other_towers_are_the_same, stored

SIZES = {"eval_window": 32, "eval_tokens": 320, "precision": "float32", "device": "cpu"}
TRAINING = {"tokens": 5120, "seq_len": 32, "batch_size": 8, "evaluations": 4, "learning_rate": 3e-3, **SIZES}


@pytest.fixture(autouse=True)
def quick(monkeypatch, request):
    """What takes seconds is left out, but for tests that ask for ``whole``."""
    if "whole" not in request.fixturenames:
        without_what_has_other_tests(monkeypatch)
        monkeypatch.setattr(writing, "verify_export", lambda *_given: ReloadCheck(0.0, 1.0))
        monkeypatch.setattr(recovery_report, "report_page", lambda _report: "")


@pytest.fixture
def whole():
    """Runs with their plans, pages and checks by a fresh process."""


@pytest.fixture
def checked(monkeypatch):
    """The result is checked by a fresh process, though the export was not."""
    monkeypatch.setattr(writing, "verify_export", verify_export)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text whose next words follow from the last ones."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(f"w{number * 7 % 60}" for number in range(8000)), encoding="utf8")
    return str(path)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, text):
    """A tiny model that knows the text: it has been trained on it, by the command itself."""
    place = tmp_path_factory.mktemp("dense")
    tiny.build("llama").save_pretrained(place / "random")
    tiny.tokenizer().save_pretrained(place / "random")
    options = TRAINING | {"tokens": 20_000, "learning_rate": 1e-2}
    found = recover(place / "random", place / "dense", data=text, **options)
    assert found.curves.points[-1].perplexity.perplexity < 2
    return str(place / "dense")


def pruned(dense, out, text, **options):
    settings = {"samples": 8, "seq_len": 16, "shots": 1, "sparsity": 0.4, "preset": "none", **SIZES, **options}
    prune_checkpoint(dense, out, calibration=text, **settings)
    return str(out)


@pytest.fixture(scope="module")
def smaller(tmp_path_factory, dense, text):
    return pruned(dense, tmp_path_factory.mktemp("smaller") / "smaller", text)


def weights(directory):
    return load_file(directory / "model.safetensors")


FORMS = {
    "rows and columns": {"structure": "rows-columns"},
    "uneven heads and neurons": {"structure": "neurons+heads"},
    "equal heads and neurons": {"structure": "neurons+heads", "uniform": True},
    "a block less": {"structure": "blocks"},
    "2:4": {"structure": "2:4"},
    "unstructured": {"structure": "unstructured", "sparsity": 0.6},
    "values": {"structure": "values", "sparsity": 0.25},
}


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_every_form_recovers_and_keeps_shapes_and_zeros(options, dense, text, tmp_path, checked):
    export = tmp_path / "export"
    pruned(dense, export, text, **options)
    found = recover(export, tmp_path / "out", teacher=dense, data=text, **TRAINING)
    before, after = weights(export), weights(tmp_path / "out")
    assert {name: (value.shape, value.dtype) for name, value in before.items()} == {
        name: (value.shape, value.dtype) for name, value in after.items()
    }
    assert any(not torch.equal(before[name], after[name]) for name in before)
    if not {"rows-columns", "neurons+heads", "blocks", "values"} & {options["structure"]}:
        zeros = {name: value == 0 for name, value in before.items() if value.ndim > 1}
        assert sum(int(mask.sum()) for mask in zeros.values()) > 1000
        assert all(not after[name][mask].any() for name, mask in zeros.items())
    # The record's perplexities are those of the files.
    model, tokenizer = load(tmp_path / "out", device="cpu")
    first, best = found.curves.points[0].perplexity, found.curves.best.perplexity
    again = evaluate(model, tokenizer, held_out(text, tmp_path), window=32, max_tokens=320, precision="float32")
    assert again.perplexity == pytest.approx(best.perplexity, rel=1e-4)
    assert best.nll < 0.7 * first.nll
    assert found.teacher_perplexity.perplexity < first.perplexity
    assert found.max_logit_difference < 1e-4 * found.logit_scale


def held_out(text, place):
    """A file of the last tenth of a text, which recovery evaluates on."""
    from llm_surgeon.data.texts import EVALUATION, part_of

    path = place / "held_out.txt"
    path.write_text(part_of(text, EVALUATION, split=True).text, encoding="utf8")
    return str(path)


@pytest.mark.parametrize("family", ["gemma2", "opt", "gpt2", "phi3", "granite", "mixtral", "qwen3-moe", "qwen3-5"])
def test_families_recover(family, text, tmp_path):
    """The teacher is a random model, whose predictions are near those of nearly the same weights."""
    model = tiny.build(family)
    model.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(tmp_path / "model")
    for name in ("dense", "model"):
        tiny.tokenizer().save_pretrained(tmp_path / name)
    options = TRAINING | {"learning_rate": 2e-3, "top_k": 0, "evaluation": "none"}
    found = recover(tmp_path / "model", tmp_path / "out", teacher=tmp_path / "dense", data=text, **options)
    assert found.curves.losses[-1].loss < 0.7 * found.curves.losses[0].loss
    before, after = weights(tmp_path / "model"), weights(tmp_path / "out")
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}


def test_experts_recover(text, tmp_path, checked):
    """Whole experts are gone, and the router knows as many as are left."""
    tiny.build("mixtral").save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    export = pruned(str(tmp_path / "dense"), tmp_path / "export", text, structure="experts", sparsity=0.25)
    options = TRAINING | {"evaluation": "none"}
    found = recover(export, tmp_path / "out", teacher=tmp_path / "dense", data=text, **options)
    assert found.curves.losses[-1].loss < 0.7 * found.curves.losses[0].loss
    before, after = weights(tmp_path / "export"), weights(tmp_path / "out")
    assert {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}


@pytest.mark.parametrize("family", ["gemma3-tower", "qwen3-vl-tower"])
def test_towers_that_read_no_text_stay_as_they_were(family, text, tmp_path, checked):
    source = stored(family, tmp_path / "dense")
    options = {"structure": "neurons+heads", "uniform": True, "round_to": 8, "dampening_g": 0.5, "sparsity": 0.3}
    export = pruned(str(source), tmp_path / "export", text, **options)
    options = TRAINING | {"evaluation": "none"}
    found = recover(export, tmp_path / "out", teacher=source, data=text, **options)
    assert_the_other_towers_are_the_same(tmp_path / "export", tmp_path / "out")
    before, after = weights(tmp_path / "export"), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("language_model" in name or "lm_head" in name for name in changed)
    assert found.trained < found.parameters


class EndedError(Exception):
    """The end of a process."""


@contextlib.contextmanager
def ended_before_step(step):
    """A process that ends when so many steps have been taken."""
    take = training.Training._step

    def ends(self, *given):
        if self.standing.step == step:
            raise EndedError
        return take(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Training, "_step", ends)
        with pytest.raises(EndedError):
            yield


@pytest.mark.parametrize(("step", "adapters"), [(0, None), (3, None), (5, None), (12, None), (12, 3)])
def test_an_interrupted_training_ends_as_one_that_was_not(step, adapters, dense, smaller, text, tmp_path, monkeypatch):
    options = TRAINING | {"teacher": dense, "data": text, "adapters": adapters}
    whole = recover(smaller, tmp_path / "whole", **options)
    # A state is kept after each step.
    monkeypatch.setattr(training, "_OFTEN", 0.0)
    with ended_before_step(step):
        recover(smaller, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    again = recover(smaller, tmp_path / "out", **options)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert again.curves.losses == whole.curves.losses
    assert [one.perplexity for one in again.curves.points] == [one.perplexity for one in whole.curves.points]
    assert not (tmp_path / "out.run").exists()


def digest(directory):
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def test_a_result_that_was_only_moved_is_complete(dense, smaller, text, tmp_path, monkeypatch):
    options = TRAINING | {"teacher": dense, "data": text, "tokens": 512, "evaluations": 1}
    with monkeypatch.context() as patch:
        patch.setattr("llm_surgeon.run.recover.sync", lambda _path: (_ for _ in ()).throw(EndedError))
        with pytest.raises(EndedError):
            recover(smaller, tmp_path / "out", **options)
    assert (tmp_path / "out").exists()
    found = recover(smaller, tmp_path / "out", **options)
    assert found == RecoveryRecord.model_validate_json((tmp_path / "out" / "recovery.json").read_bytes())
    assert not (tmp_path / "out.run").exists()


def test_the_best_weights_are_the_result_and_training_stops_when_it_gets_worse(smaller, text, tmp_path, monkeypatch):
    """Perplexities are told rather than measured, and the weights at each are looked at."""
    told, seen, measure = [3.0, 2.0, 1.0, 1.0, 2.0, 1.5], [], training.perplexity

    def perplexity(model, text, advance):
        seen.append({name: value.clone() for name, value in model.named_parameters()})
        found = measure(model, text, advance)
        return found.model_copy(update={"nll": told[len(seen) - 1]})

    monkeypatch.setattr(training, "perplexity", perplexity)
    found = recover(smaller, tmp_path / "out", data=text, patience=3, **TRAINING | {"evaluations": 10})
    assert found.stopped_early
    assert [point.tokens for point in found.curves.points] == [512 * number for number in range(6)]
    assert (found.result_tokens, found.tokens) == (1024, 2560)
    model, _ = load(tmp_path / "out", device="cpu")
    for name, value in model.named_parameters():
        assert torch.equal(value, seen[2][name])


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_learning_rate_rises_and_falls(steps):
    rates = [training.rate(step, steps, 0.1) for step in range(steps)]
    top = rates.index(max(rates))
    assert max(rates) == 1.0
    assert top == math.ceil(0.1 * steps) - 1
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert training.rate(steps, steps, 0.0) == pytest.approx(0.1)
    assert training.rate(0, steps, 0.0) == 1.0


def test_a_training_that_makes_it_worse_writes_nothing(dense, text, tmp_path):
    options = TRAINING | {"tokens": 1024, "learning_rate": 0.9, "warmup": 0.0}
    with pytest.raises(RecoveryError, match=r"Training has not helped: held-out perplexity was 1\.\d+ before, and"):
        recover(dense, tmp_path / "out", data=text, **options)
    assert not (tmp_path / "out").exists()


def test_without_an_evaluation_the_last_weights_are_the_result(smaller, text, tmp_path):
    found = recover(smaller, tmp_path / "out", data=text, evaluation="none", **TRAINING)
    assert found.curves.points == ()
    assert found.curves.losses[-1].loss < found.curves.losses[0].loss
    assert found.result_tokens == found.tokens == 5120


def test_gradient_checkpointing_changes_nothing(dense, smaller, text, tmp_path):
    options = TRAINING | {"teacher": dense, "data": text, "tokens": 1024, "evaluations": 1}
    recover(smaller, tmp_path / "a", **options)
    recover(smaller, tmp_path / "b", gradient_checkpointing=True, **options)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_passes_of_fewer_sequences_make_the_same_steps(dense, smaller, text, tmp_path):
    options = TRAINING | {"teacher": dense, "data": text, "tokens": 1024, "evaluations": 1}
    found = [recover(smaller, tmp_path / f"{size}", pass_size=size, **options) for size in (8, 3)]
    losses = [[point.loss for point in one.curves.losses] for one in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("structure", ["rows-columns", "2:4"])
def test_adapters_change_linear_layers_of_the_blocks_only_and_no_zero(structure, dense, text, tmp_path):
    export = tmp_path / "export"
    pruned(dense, export, text, structure=structure)
    found = recover(
        export, tmp_path / "out", teacher=dense, data=text, adapters=4, **TRAINING | {"learning_rate": 1e-2}
    )
    before, after = weights(export), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("layers." in name and "proj" in name for name in changed)
    assert all(not after[name][before[name] == 0].any() for name in changed)
    assert found.trained < found.parameters
    assert found.curves.best.perplexity.perplexity < 0.9 * found.curves.points[0].perplexity.perplexity


def in_half_precision(dense, directory):
    shutil.copytree(dense, directory)
    state = {name: value.bfloat16() for name, value in weights(directory).items()}
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return str(directory)


def test_steps_too_small_for_half_precision_add_up(dense, text, tmp_path):
    """A checkpoint in bfloat16 is trained in float32, and stored as it was."""
    source = in_half_precision(dense, tmp_path / "half")
    export = pruned(source, tmp_path / "export", text)
    # A step of AdamW is about the rate: far below half a unit in the last place of most weights.
    options = TRAINING | {"learning_rate": 1e-4, "evaluation": "none"}
    recover(export, tmp_path / "out", teacher=source, data=text, **options)
    before, after = weights(tmp_path / "export"), weights(tmp_path / "out")
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.bfloat16}
    changed = sum(int((before[name] != after[name]).sum()) for name in before)
    assert changed > 0.2 * sum(value.numel() for value in before.values())


def test_report_page_and_card_tell_of_the_recovery_and_other_formats_are_left_out(dense, text, tmp_path, whole):
    export = tmp_path / "export"
    pruned(dense, export, text)
    (export / "gguf").mkdir()
    (export / "gguf" / "model.gguf").write_bytes(b"weights of before")
    (export / "LICENSE").write_text("a licence")
    out = tmp_path / "out"
    given = [word for name, value in TRAINING.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = ["recover", str(export), "--teacher", dense, "--out", str(out), "--data", text, *given]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    assert "the result" in found.output
    assert "The reloaded result agrees with the model in memory." in found.output
    report = PruneReport.model_validate_json((out / "report.json").read_bytes())
    record = RecoveryRecord.model_validate_json((out / "recovery.json").read_bytes())
    assert report.recovery == record
    assert report.recovery.teacher == "dense"
    assert all(str(tmp_path) not in (out / name).read_text() for name in ("report.json", "recovery.json"))
    assert str(tmp_path) not in (out / "README.md").read_text()
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    best = f"{record.curves.best.perplexity.perplexity:.2f}"
    assert "Held-out perplexity and training loss by tokens" in page
    assert best in page
    assert "## Recovery" in card
    assert best in card
    assert (out / "LICENSE").read_text() == "a licence"
    assert (out / "recipe.yaml").read_bytes() == (export / "recipe.yaml").read_bytes()
    assert not (out / "gguf").exists()


IN_RUN = {"recover_tokens": 5120, "recover_batch_size": 8, "recover_learning_rate": 3e-3}


def test_a_run_trains_what_it_leaves_as_the_command_does(dense, text, tmp_path, monkeypatch):
    """At its end and, interrupted there, from where it was."""
    options = {"export_shots": (1,), "shots": 2}
    pruned(dense, tmp_path / "export", text, **options)
    shared = {"seq_len": 16, "tokens": 5120, "learning_rate": 3e-3, **SIZES}
    by_hand = recover(tmp_path / "export", tmp_path / "by-hand", teacher=dense, data=text, **shared)
    monkeypatch.setattr(training, "_OFTEN", 0.0)
    with ended_before_step(30):
        pruned(dense, tmp_path / "out", text, **options, **IN_RUN)
    assert not (tmp_path / "out").exists()
    pruned(dense, tmp_path / "out", text, **options, **IN_RUN)
    assert digest(tmp_path / "out") == digest(tmp_path / "by-hand") != digest(tmp_path / "export")
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    report = PruneReport.model_validate_json((tmp_path / "out" / "report.json").read_bytes())
    assert report.recovery.curves.losses == by_hand.curves.losses
    assert report.recovery.model == "out"
    assert report.config["recover_tokens"] == 5120
    # The export of the first shot is there, and not trained.
    assert digest(tmp_path / "out" / "shot-1") == digest(tmp_path / "export" / "shot-1")


def test_a_run_whose_training_does_not_help_is_as_it_was_pruned(dense, text, tmp_path, caplog):
    pruned(dense, tmp_path / "export", text)
    told = IN_RUN | {"recover_learning_rate": 0.9}
    with caplog.at_level("WARNING"):
        pruned(dense, tmp_path / "out", text, **told)
    assert "Training has not helped" in caplog.text
    assert digest(tmp_path / "out") == digest(tmp_path / "export")
    assert not (tmp_path / "out" / "recovery.json").exists()


def test_a_run_whose_training_fails_is_as_it_was_pruned(dense, text, tmp_path, monkeypatch, caplog):
    """Whether it cannot begin, or its files cannot be verified."""
    pruned(dense, tmp_path / "export", text)
    monkeypatch.setattr(opening, "check_memory", refuses)
    pruned(dense, tmp_path / "a", text, **IN_RUN)
    assert "No memory. The export is as it was pruned" in caplog.text
    monkeypatch.undo()
    without_what_has_other_tests(monkeypatch)
    monkeypatch.setattr(writing, "verify_export", lambda *_given: refuses(kind=ExportMismatchError))
    pruned(dense, tmp_path / "b", text, **IN_RUN)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "export")


def refuses(*_given, kind=ConfigError):
    raise kind("No memory.", "Buy some.")


def test_the_plan_of_a_run_has_its_training(dense, text, whole):
    options = {"calibration": text, "samples": 8, "seq_len": 16, "preset": "none", "shots": 1, **SIZES}
    without, with_training = plan(dense, **options), plan(dense, **options, **IN_RUN)
    (phase,) = [phase for phase in with_training.phases if phase.name == "recovery"]
    assert phase.host["weights, gradients and moments"] == 16 * with_training.size.total
    assert phase.seconds > 0
    assert with_training.seconds == pytest.approx(without.seconds + phase.seconds)
    assert with_training.disk >= without.disk + 32 * with_training.size.total


def test_a_training_that_does_not_fit_the_memory_of_a_run_is_refused(dense, text, tmp_path, whole):
    """A model of a hundred million weights, of which a plan needs the configuration alone."""
    shutil.copytree(dense, tmp_path / "large", ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8}
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    (tmp_path / "large" / "config.json").write_text(json.dumps(config | sizes))
    options = {"calibration": text, "samples": 4, "seq_len": 16, "preset": "none", "shots": 1, **SIZES}
    options |= {"method": "magnitude", "structure": "rows-columns", "sparsity": 0.1, "host_memory": "1.5GiB"}
    assert plan(tmp_path / "large", **options).host_available == 1.5 * 2**30
    with pytest.raises(ConfigError, match=r"The training after the last shot .* needs about .*, and --host-memory is"):
        plan(tmp_path / "large", **options, **IN_RUN)


def test_training_in_a_run_is_refused_where_it_cannot_be(dense, tmp_path):
    model, tokenizer = load(dense, device="cpu")
    with pytest.raises(ConfigError, match="loads the dense model anew"):
        prune(model, tokenizer, recover_tokens=10_000)
    for words, options in {
        "are fewer than one step of 8 sequences": {"recover_tokens": 100},
        "leave the others out": {"recover_tokens": 10_000, "formats": ("hf", "gguf")},
        "recover_batch_size has no effect": {"recover_batch_size": 4},
    }.items():
        with pytest.raises(ConfigError, match=words):
            PruneConfig.from_mapping(options)
    with pytest.raises(ConfigError, match="recover_tokens is no option that the cells"):
        compare(
            dense, tmp_path / "out", {"a": {}}, [Setting(structure="2:4", sparsity=0.5)], {"recover_tokens": 10_000}
        )


def test_what_cannot_be_is_refused_before_a_model_is_loaded(dense, smaller, text, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_surgeon.run.recover.load_model", lambda *_given: pytest.fail("it was loaded"))
    out, common = tmp_path / "out", {"data": text, **TRAINING}
    with pytest.raises(ConfigError, match="100 tokens are fewer than one step"):
        recover(smaller, out, **common | {"tokens": 100})
    with pytest.raises(ConfigError, match=r"--learning-rate .* has to be more than 0"):
        recover(smaller, out, **common | {"learning_rate": 0.0})
    with pytest.raises(ConfigError, match="temperature, label_weight have no effect without a teacher"):
        recover(smaller, out, temperature=2.0, label_weight=0.5, **common)
    with pytest.raises(ConfigError, match=r"'learning' is no option"):
        recover(smaller, out, learning=1.0, **common)
    with pytest.raises(ConfigError, match="evaluation cannot be none"):
        recover(smaller, out, evaluation="none", patience=2, **common)
    with pytest.raises(DataError, match="does not exist"):
        recover(smaller, out, **common | {"data": "missing.txt"})
    shutil.copytree(dense, tmp_path / "other")
    words = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    one, other = list(vocabulary)[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ConfigError, match="has other tokens than the export's"):
        recover(smaller, out, teacher=tmp_path / "other", **common)
    out.mkdir()
    (out / "file").write_text("")
    with pytest.raises(OutputError, match="is not empty"):
        recover(smaller, out, **common)
    assert not (tmp_path / "out.run").exists()


def test_a_divergence_late_in_the_training_does_not_cost_the_best_weights(smaller, text, tmp_path, monkeypatch, caplog):
    forward, passes = training.Student.forward, itertools.count()

    def diverges(self, *given):
        # Two passes make a step.
        return forward(self, *given) * (float("nan") if next(passes) >= 24 else 1.0)

    monkeypatch.setattr(training.Student, "forward", diverges)
    found = recover(smaller, tmp_path / "out", data=text, pass_size=4, **TRAINING)
    assert "The loss of step 13 is not finite. The weights after 10 steps are taken." in caplog.text
    assert found.stopped_early
    assert (found.result_tokens, found.tokens) == (2560, 3072)
    assert found.perplexity.nll < found.curves.points[0].perplexity.nll


def test_a_damaged_identity_is_no_recovery_to_go_on_from(smaller, text, tmp_path, monkeypatch, caplog):
    with ended_before_step(12):
        recover(smaller, tmp_path / "out", data=text, **TRAINING)
    assert list((tmp_path / "out.run").glob("state-*"))
    (tmp_path / "out.run" / "recover.json").write_text("{")
    found = recover(smaller, tmp_path / "out", data=text, **TRAINING)
    assert "the recovery begins anew" in caplog.text
    assert "continuing after" not in caplog.text
    assert found.tokens == 5120


def test_the_same_file_by_another_path_is_held_out(smaller, text, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(text).parent)
    options = TRAINING | {"tokens": 1024, "evaluations": 1}
    found = recover(smaller, tmp_path / "out", data=text, evaluation=f"./{Path(text).name}", **options)
    assert "characters 1-" in found.sources[0].source
    assert "held-out part" in found.curves.points[0].perplexity.data


@pytest.mark.parametrize("adapters", [None, 4])
def test_the_perplexity_of_a_result_in_half_precision_is_that_of_the_files(adapters, dense, text, tmp_path):
    source = in_half_precision(dense, tmp_path / "half")
    export = pruned(source, tmp_path / "export", text)
    options = TRAINING | {"learning_rate": 1e-2, "adapters": adapters}
    found = recover(export, tmp_path / "out", teacher=source, data=text, **options)
    model, tokenizer = load(tmp_path / "out", device="cpu")
    again = evaluate(model, tokenizer, held_out(text, tmp_path), window=32, max_tokens=320, precision="float32")
    assert again.perplexity == pytest.approx(found.perplexity.perplexity, rel=1e-5)
    assert found.perplexity.nll < 0.9 * found.curves.points[0].perplexity.nll


def test_all_tokens_of_the_teacher_by_every_way_to_ask(dense, smaller, text, tmp_path):
    common = {"data": text, **TRAINING, "tokens": 512, "evaluations": 1}
    recover(smaller, tmp_path / "a", teacher=dense, top_k=0, **common)
    recover(smaller, tmp_path / "b", RecoverConfig.from_mapping({"top_k": 0, **common}), teacher=dense)
    words = [word for name, value in common.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = ["recover", smaller, "--teacher", dense, "--out", str(tmp_path / "c"), "--top-k", "0", *words]
    assert CliRunner().invoke(app, command).exit_code == 0
    recover(smaller, tmp_path / "d", teacher=dense, top_k=2, **common)
    digests = [digest(tmp_path / name) for name in "abcd"]
    assert len(set(digests[:3])) == 1
    assert digests[3] != digests[0]


def test_code_of_a_checkpoint_is_neither_run_nor_kept(dense, text, tmp_path, whole):
    """The class of transformers is loaded, and what is written names no other."""
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(dense, model)
    (model / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((model / "config.json").read_text()) | {
        "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}
    }
    (model / "config.json").write_text(json.dumps(config))
    recover(model, tmp_path / "out", data=text, **TRAINING | {"evaluation": "none", "tokens": 512})
    assert not mark.exists()
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_package_works_without_peft(smaller, text, tmp_path, monkeypatch):
    """Only adapters need it, and say so."""
    program = "import sys; sys.modules['peft'] = None; import llm_surgeon.run.run, llm_surgeon.run.recover"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="Adapters need the package peft"):
        recover(smaller, tmp_path / "out", data=text, adapters=4, **TRAINING)


def test_a_teacher_with_fewer_positions_and_quantised_weights_are_refused(text, tmp_path):
    for name, changes in {"model": {}, "teacher": {"n_positions": 16}}.items():
        tiny.gpt2(**changes).save_pretrained(tmp_path / name)
        tiny.tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(ConfigError, match="seq_len is 32, and the model has learned 16 positions"):
        recover(tmp_path / "model", tmp_path / "out", teacher=tmp_path / "teacher", data=text, **TRAINING)
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedModelError, match="are quantised"):
        recover(tmp_path / "model", tmp_path / "out", data=text, **TRAINING)


def test_a_report_of_another_version_is_left_out(dense, smaller, text, tmp_path, caplog):
    shutil.copytree(smaller, tmp_path / "export")
    (tmp_path / "export" / "report.json").write_text('{"version": 0}')
    recover(tmp_path / "export", tmp_path / "out", teacher=dense, data=text, **TRAINING)
    assert "is of another version" in caplog.text
    assert not (tmp_path / "out" / "report.json").exists()
    assert "## Recovery" in (tmp_path / "out" / "README.md").read_text()


def test_another_recovery_and_another_run_are_not_taken_over(dense, smaller, text, tmp_path, monkeypatch):
    options, out = {"teacher": dense, "data": text, **TRAINING}, tmp_path / "out"
    with ended_before_step(6):
        recover(smaller, out, **options)
    with pytest.raises(OutputError, match=r"was begun with something else \(config\)"):
        recover(smaller, out, **options | {"learning_rate": 1e-4})
    with pytest.raises(OutputError, match="holds what `llm-surgeon recover` needs to go on"):
        pruned(dense, out, text)
    assert "goes on from its last state" in _how_to_go_on(out)
    assert recover(smaller, out, **options).tokens == 5120
    assert "is complete" in _how_to_go_on(out)


def test_a_loss_that_is_not_finite_ends_the_training(smaller, text, tmp_path, monkeypatch):
    forward = training.Student.forward
    monkeypatch.setattr(training.Student, "forward", lambda self, *given: forward(self, *given) * float("nan"))
    with pytest.raises(NonFiniteError, match="The loss of step 1 is not finite"):
        recover(smaller, tmp_path / "out", data=text, **TRAINING)
