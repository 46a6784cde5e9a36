"""A run that was ended goes on after its last complete shot, to the same weights bit for bit."""

import hashlib
import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_surgeon import PruneConfig, prune, prune_checkpoint
from llm_surgeon.errors import ConfigError, NonFiniteError, OutputError
from llm_surgeon.export import hugging_face
from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.pruning import targets
from llm_surgeon.pruning.checkpoint import Checkpoints
from llm_surgeon.records import PruneReport
from llm_surgeon.report.publish import without_paths
from llm_surgeon.run import job as job_module
from llm_surgeon.run import opening as opening_module
from llm_surgeon.run import run as run_module
from quick import without_what_has_other_tests
from tiny import build, tokenizer

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 16,
    "eval_window": 32,
    "eval_tokens": 64,
    "shots": 3,
    "precision": "float32",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_what_has_other_tests(monkeypatch)


@pytest.fixture
def ended(monkeypatch):
    """Makes runs end with an interrupt once the checkpoint of a shot is written; 0: never."""
    write = Checkpoints.write
    after = [0]

    def interrupted(self, checkpoint, tensors):
        write(self, checkpoint, tensors)
        if checkpoint.shot == after[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "write", interrupted)

    def run(model, out, config, shot):
        after[0] = shot
        try:
            if shot == 0:
                return prune_checkpoint(str(model), out, config)
            with pytest.raises(KeyboardInterrupt):
                prune_checkpoint(str(model), out, config)
            assert not out.exists()
            return None
        finally:
            after[0] = 0

    return run


def recipe(text_file, **changes):
    return PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), **changes})


def weights(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.safetensors"))}


def without_times(report):
    """What has to be the same of two runs of a recipe."""
    left = report.model_dump(exclude={"memory", "continued", "plan", "export"})
    for shot in left["shots"]:
        del shot["profile"]
        for stage in shot["stages"]:
            del stage["seconds"], stage["peak"]
    return left


CASES = {
    "rows-columns": ("llama", {"sparsity": 0.5, "gradient_share": 0.5}),
    "biases": ("opt", {"sparsity": 0.4}),
    "transposed, bfloat16": ("gpt2", {"structure": "neurons+rows-columns", "dtype": "bfloat16"}),
    "neurons+heads": ("phi3", {"structure": "neurons+heads", "round_to": 2}),
    "values": ("llama", {"structure": "values+neurons", "round_to": 1, "fisher": "true"}),
    "an emptied attention": ("llama", {"structure": "blocks", "sparsity": 0.8}),
    "heads of a delta net": ("qwen3-5", {"structure": "heads+rows-columns", "sparsity": 0.5, "reconstruction": True}),
    "unstructured": ("llama-biased", {"structure": "unstructured"}),
    "2:4": ("opt", {"structure": "2:4"}),
    "power iteration": ("opt", {"curvature": "nearest-kronecker", "sparsity": 0.4}),
    "reconstruction": ("gpt2", {"sparsity": 0.4, "reconstruction": True, "order": "layer-major"}),
    "gates": ("opt", {"sparsity": 0.4, "reconstruction": True, "gate_steps": 1}),
    "cross-fitting": ("llama", {"sparsity": 0.4, "reconstruction": True, "gate_steps": 1, "cross_fit": True}),
    "power iteration of a sum": ("llama", {"curvature": "kronecker-sum", "structure": "unstructured"}),
}
LORA = {"lora": True, "lora_steps": 2, "lora_final_steps": 3, "lora_rank": 2}


@pytest.mark.parametrize("case", CASES)
def test_a_run_ended_after_each_shot_gives_the_same_bits(case, text_file, tmp_path, ended, caplog):
    family, options = CASES[case]
    compare_ended_and_not(family, recipe(text_file, **options), tmp_path, ended, caplog)


@pytest.mark.parametrize("structure", ["rows-columns", "unstructured"])
def test_corrections_go_on_to_the_same_bits(structure, text_file, tmp_path, ended, caplog):
    pytest.importorskip("peft")
    config = recipe(text_file, structure=structure, sparsity=0.4, **LORA)
    compare_ended_and_not("llama", config, tmp_path, ended, caplog)


@pytest.mark.parametrize("options", [{"method": "stochria"}, {"method": "wanda", "permute": True, "structure": "2:4"}])
def test_layerwise_methods_have_only_their_export_left(options, text_file, tmp_path, ended, caplog):
    compare_ended_and_not("llama", recipe(text_file, shots=1, **options), tmp_path, ended, caplog)


@pytest.mark.parametrize("changes", [{"sparsity": 0.4}, {"structure": "heads", "sparsity": 0.9}])
def test_another_command_is_not_told_that_it_continues(changes, checkpoint, text_file, tmp_path, ended, caplog):
    """Refused by the comparison with the run that is there, or by something before it."""
    out, first = tmp_path / "out", recipe(text_file, sparsity=0.3, shots=2)
    ended(checkpoint, out, first, 1)
    caplog.clear()
    with pytest.raises((OutputError, ConfigError)):
        prune_checkpoint(str(checkpoint), out, recipe(text_file, shots=2, **changes))
    assert "the same command" not in caplog.text
    assert ended(checkpoint, out, first, 0).continued == (1,)


def compare_ended_and_not(family, config, tmp_path, ended, caplog):
    caplog.set_level(logging.INFO)
    model = tmp_path / "dense"
    build(family).save_pretrained(model)
    tokenizer().save_pretrained(model)
    whole = ended(model, tmp_path / "whole", config, 0)
    for shot in range(1, config.shots + 1):
        ended(model, tmp_path / "ended", config, shot)
        assert f"the same command continues after shot {shot}" in caplog.text
    report = ended(model, tmp_path / "ended", config, 0)
    for shot in range(1, config.shots + 1):
        assert f"continuing after shot {shot} of {config.shots}" in caplog.text
    assert weights(tmp_path / "ended") == weights(tmp_path / "whole") != {}
    assert without_times(report) == without_times(whole)
    assert report.continued == tuple(range(1, config.shots + 1))
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "ended", "text.txt", "whole"}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that was ended after the second of three shots, the weights that it leads to, and how to go on."""
    directory = tmp_path_factory.mktemp("half")
    generator = random.Random(0)
    text = directory / "text.txt"
    text.write_text(" ".join(f"w{generator.randrange(64)}" for _ in range(3000)))
    build("llama").save_pretrained(directory / "dense")
    tokenizer().save_pretrained(directory / "dense")
    config = recipe(text, sparsity=0.4, evaluation="none")
    write = Checkpoints.write

    def interrupted(self, checkpoint, tensors):
        write(self, checkpoint, tensors)
        if checkpoint.shot == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        without_what_has_other_tests(patch)
        prune_checkpoint(str(directory / "dense"), directory / "whole", config)
        patch.setattr(Checkpoints, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(str(directory / "dense"), directory / "out", config)
    assert {path.name for path in (directory / "out.run").iterdir()} >= {"lock", "run.json", "recipe.yaml"}
    return directory, config


@pytest.fixture
def copied(half, tmp_path):
    """A copy of that run's directory, and how to continue it."""
    directory, config = half
    shutil.copytree(directory / "out.run", tmp_path / "out.run")

    def go_on(model=directory / "dense", **changes):
        changed = PruneConfig.from_mapping({**config.model_dump(exclude_unset=True), **changes})
        report = prune_checkpoint(str(model), tmp_path / "out", changed)
        assert weights(tmp_path / "out") == weights(directory / "whole")
        assert not (tmp_path / "out.run").exists()
        return report

    return tmp_path / "out.run", go_on


def flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    os.truncate(path, 0)


def removed(path):
    path.unlink()


DAMAGES = pytest.mark.parametrize("damage", [flipped, truncated, emptied, removed], ids=lambda f: f.__name__)


@DAMAGES
@pytest.mark.parametrize("name", ["shot-2.safetensors", "shot-2.json", "shot-2.sha256"])
def test_a_damaged_checkpoint_is_not_used_but_the_one_before(name, damage, copied, caplog):
    path, go_on = copied
    damage(path / name)
    assert go_on().continued == (1,)
    # Without its checksums it is one that was never complete.
    assert ("the checkpoint of shot 2 is damaged" in caplog.text) == ((name, damage) != ("shot-2.sha256", removed))


@DAMAGES
@pytest.mark.parametrize("name", ["run.json", "recipe.yaml"])
def test_what_describes_the_run_is_in_its_checkpoints_too(name, damage, copied):
    path, go_on = copied
    damage(path / name)
    assert go_on().continued == (2,)


def test_without_any_checkpoint_that_is_whole_the_run_begins_anew(copied, caplog):
    path, go_on = copied
    for shot in (1, 2):
        flipped(path / f"shot-{shot}.safetensors")
    assert go_on().continued == ()
    assert "shot 1 is damaged" in caplog.text
    assert "shot 2 is damaged" in caplog.text


def test_a_checkpoint_is_no_pickle_and_two_are_kept(half):
    names = {path.name for path in (half[0] / "out.run").glob("shot-*")}
    assert names == {f"shot-{shot}.{ending}" for shot in (1, 2) for ending in ("safetensors", "json", "sha256")}


def test_older_checkpoints_go(text_file, checkpoint, tmp_path, ended):
    ended(checkpoint, tmp_path / "out", recipe(text_file, shots=4, sparsity=0.4), 4)
    assert Checkpoints(tmp_path / "out.run").shots() == [4, 3]


class TestSomethingElse:
    """What was begun with another recipe, model or text is not continued, and not lost either."""

    @pytest.fixture(autouse=True)
    def loads_nothing(self, monkeypatch):
        monkeypatch.setattr(opening_module, "loaded", lambda *_, **__: pytest.fail("loaded"))

    def test_another_recipe(self, copied):
        path, go_on = copied
        with pytest.raises(OutputError, match=r"shots was 3 and is 5; seed was 0 and is 1\. .* remove .*out\.run"):
            go_on(shots=5, seed=1)
        assert Checkpoints(path).shots() == [2, 1]

    def test_a_model_that_was_written_anew(self, half, copied, tmp_path):
        _, go_on = copied
        shutil.copytree(half[0] / "dense", tmp_path / "dense", copy_function=shutil.copyfile)
        with pytest.raises(OutputError, match=r"model\.safetensors was '[\d,]+ bytes of .*' and is '"):
            go_on(model=tmp_path / "dense")

    def test_another_text(self, half, copied):
        _, go_on = copied
        text = half[0] / "text.txt"
        before = text.read_text()
        try:
            text.write_text(before.replace("w1 ", "w2 "))
            with pytest.raises(OutputError, match="the calibration or the evaluation text has changed"):
                go_on()
        finally:
            text.write_text(before)

    def test_a_run_without_checkpoints_would_lose_it(self, copied, text_file):
        path, _ = copied
        with pytest.raises(OutputError, match=r"can continue\. Remove it"):
            prune(build("llama"), tokenizer(), recipe(text_file), out=path.with_suffix(""))
        assert Checkpoints(path).shots() == [2, 1]


def test_without_a_shot_to_lose_another_recipe_begins_anew(copied):
    path, go_on = copied
    for file in path.glob("shot-*"):
        file.unlink()
    saved = json.loads((path / "run.json").read_text())
    saved["recipe"]["shots"] = 7
    (path / "run.json").write_text(json.dumps(saved))
    assert go_on().continued == ()


def reworded(path, change):
    """Change the words of the newest checkpoint, with the checksum that fits."""
    words, sums = path / "shot-2.json", path / "shot-2.sha256"
    saved = json.loads(words.read_text())
    change(saved)
    words.write_text(json.dumps(saved))
    first = sums.read_text().splitlines()[0]
    sums.write_text(f"{first}\n{hashlib.sha256(words.read_bytes()).hexdigest()}  shot-2.json\n")


def test_other_versions_are_a_warning(copied, caplog):
    path, go_on = copied
    reworded(path, lambda saved: saved["run"]["circumstances"].update(torch="1.0"))
    assert go_on().continued == (2,)
    assert f"torch was '1.0' and is '{torch.__version__}'" in caplog.text


def test_a_checkpoint_in_other_words_is_neither_used_nor_lost(copied):
    path, go_on = copied
    reworded(path, lambda saved: saved.update(news="of a later version"))
    with pytest.raises(OutputError, match=r"another version of llm-surgeon.* Continue with that version"):
        go_on()
    assert Checkpoints(path).shots() == [2, 1]


def test_two_runs_into_one_directory(text_file, checkpoint, tmp_path, monkeypatch):
    """The second one is refused at once, and the first one does not notice."""
    config, seen = recipe(text_file, shots=1, sparsity=0.3), []

    def second(*_):
        with pytest.raises(OutputError, match="Another process works on"):
            prune_checkpoint(str(checkpoint), tmp_path / "out", config)
        seen.append(True)
        return ReloadCheck(0.0, 1.0)

    monkeypatch.setattr(hugging_face, "verify_export", second)
    prune_checkpoint(str(checkpoint), tmp_path / "out", config)
    assert seen
    assert (tmp_path / "out").is_dir()


def test_somebody_elses_directory_is_not_touched(text_file, checkpoint, tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "thesis.tex").write_text("irreplaceable")
    with pytest.raises(OutputError, match="is no directory of a run"):
        prune_checkpoint(str(checkpoint), tmp_path / "out", recipe(text_file))
    assert [path.name for path in (tmp_path / "out.run").iterdir()] == ["thesis.tex"]


def test_an_error_before_the_first_checkpoint_leaves_nothing(text_file, checkpoint, tmp_path, monkeypatch):
    def fail(*_args, **_named):
        raise NonFiniteError("It is not finite.", "Nothing helps.")

    monkeypatch.setattr("llm_surgeon.pruning.shots.estimate", fail)
    with pytest.raises(NonFiniteError):
        prune_checkpoint(str(checkpoint), tmp_path / "out", recipe(text_file))
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_what_a_kill_left_half_written_is_removed(copied):
    path, go_on = copied
    (path / "shot-3.safetensors").write_bytes(b"whole, but its checksums were not written")
    (path / "shot-3.json.partial").write_text("{")
    (path / "check-1234.partial").mkdir()
    (path / "export").mkdir()
    (path / "export" / "model.safetensors").write_bytes(b"half")
    assert go_on().continued == (2,)


class TestTheEnd:
    """A kill between the completed export and its being in place, and after."""

    @pytest.fixture
    def killed(self, text_file, checkpoint, tmp_path, monkeypatch):
        """Ends a run where one call would be made."""

        def run(module, name):
            def kill(*_args, **_named):
                raise SystemError("killed")

            with monkeypatch.context() as patch:
                patch.setattr(module, name, kill)
                patch.setattr("llm_surgeon.run.run_directory.RunDirectory.leave", lambda _: None)
                with pytest.raises(SystemError):
                    prune_checkpoint(str(checkpoint), tmp_path / "out", config)
            monkeypatch.setattr(opening_module, "loaded", lambda *_, **__: pytest.fail("loaded"))
            return tmp_path, lambda: prune_checkpoint(str(checkpoint), tmp_path / "out", config)

        config = recipe(text_file, shots=1, sparsity=0.3)
        return run

    def test_before_the_move(self, killed):
        path, again = killed(run_module.RunDirectory, "_put_in_place")
        assert again().export.path == str(path / "out")
        assert {entry.name for entry in path.iterdir()} == {"out", "text.txt"}

    def test_after_the_move(self, killed):
        path, again = killed(run_module.RunDirectory, "remove")
        report = again()
        assert PruneReport.model_validate_json((path / "out" / "report.json").read_text()) == without_paths(report)
        assert {entry.name for entry in path.iterdir()} == {"out", "text.txt"}


def test_exports_of_shots_survive(text_file, checkpoint, tmp_path, ended, monkeypatch):
    config = recipe(text_file, sparsity=0.4, export_shots=(1, 2))
    ended(checkpoint, tmp_path / "whole", config, 0)
    ended(checkpoint, tmp_path / "out", config, 2)
    assert (tmp_path / "out.run" / "export" / "shot-1" / "report.json").is_file()
    assert not (tmp_path / "out.run" / "export" / "shot-2").exists()
    exported = []
    original = hugging_face.save_model

    def noted(model, tokenizer, anatomy, keep, directory, source):
        exported.append(directory.name)
        return original(model, tokenizer, anatomy, keep, directory, source)

    monkeypatch.setattr(hugging_face, "save_model", noted)
    ended(checkpoint, tmp_path / "out", config, 0)
    assert exported == ["shot-2.partial", "export"]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert [path.name for path in sorted((tmp_path / "out").glob("shot*"))] == ["shot-1", "shot-2"]


def test_a_latency_is_not_measured_again(text_file, checkpoint, tmp_path, ended, monkeypatch):
    config = recipe(text_file, structure="neurons", round_to=1, target_latency=1.0, shots=2)
    times = iter([0.002, 0.0015, 0.0008, 0.0004])
    monkeypatch.setattr(targets, "seconds_of", lambda _: next(times))
    ended(checkpoint, tmp_path / "out", config, 1)
    monkeypatch.setattr(targets, "seconds_of", lambda _: 0.001)
    report = ended(checkpoint, tmp_path / "out", config, 0)
    assert report.target.reached == 1.0
    assert len({shot.target_sparsity / shot.shot for shot in report.shots}) == 1


def test_the_work_is_kept_before_its_evaluation(text_file, checkpoint, tmp_path, monkeypatch):
    """An evaluation may take long and fail; a run that goes on evaluates, and does not prune again."""
    config = recipe(text_file, sparsity=0.4)
    whole = prune_checkpoint(checkpoint, tmp_path / "whole", config)
    measure, calls = job_module.measure, []

    def failing(*arguments, **more):
        calls.append(arguments[3])
        if calls == ["dense: perplexity", "shot 1/3: perplexity"]:
            raise NonFiniteError("The loss is not finite.", "Try again.")
        return measure(*arguments, **more)

    monkeypatch.setattr(job_module, "measure", failing)
    with pytest.raises(NonFiniteError):
        prune_checkpoint(checkpoint, tmp_path / "out", config)
    kept = Checkpoints(tmp_path / "out.run").newest_whole()
    assert kept.shot == 1
    assert kept.report.shots[0].perplexity is None
    calls.clear()
    report = prune_checkpoint(checkpoint, tmp_path / "out", config)
    assert calls == [f"shot {shot}/3: perplexity" for shot in (1, 2, 3)]
    assert without_times(report) == without_times(whole)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["after the rename", "before the rename"])
@pytest.mark.parametrize("file", ["shot-1.safetensors", "shot-1.json", "shot-1.sha256"])
def test_an_interrupt_in_the_moment_a_checkpoint_gets_its_name_loses_nothing(
    text_file, checkpoint, tmp_path, monkeypatch, file, moment
):
    config = recipe(text_file, sparsity=0.4, shots=2)
    whole = prune_checkpoint(checkpoint, tmp_path / "whole", config)
    replace = os.replace
    seen = []

    def interrupted(source, target):
        hit = Path(target).name == file and not seen
        if hit:
            seen.append(target)
        if hit and moment == "before the rename":
            raise KeyboardInterrupt
        replace(source, target)
        if hit:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(checkpoint, tmp_path / "out", config)
    complete = file == "shot-1.sha256" and moment == "after the rename"
    shots = Checkpoints(tmp_path / "out.run").shots() if (tmp_path / "out.run").exists() else []
    assert shots == ([1] if complete else [])
    report = prune_checkpoint(checkpoint, tmp_path / "out", config)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert without_times(report) == without_times(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt", "whole"]


@pytest.mark.parametrize("place", ["after the first checksums", "after the words"])
def test_an_amended_checkpoint_is_complete_whenever_it_ends(text_file, checkpoint, tmp_path, monkeypatch, place):
    config = recipe(text_file, sparsity=0.4, shots=2)
    whole = prune_checkpoint(checkpoint, tmp_path / "whole", config)
    write, sums = Checkpoints._write_words, Checkpoints._write_sums
    count = {"words": 0, "sums": 0}

    def counted(kind, original, last):
        def call(self, *arguments):
            original(self, *arguments)
            count[kind] += 1
            if count[kind] == last:
                raise KeyboardInterrupt

        return call

    # The first of each are those of the checkpoint itself.
    first = place == "after the first checksums"
    monkeypatch.setattr(Checkpoints, "_write_words", counted("words", write, 0 if first else 2))
    monkeypatch.setattr(Checkpoints, "_write_sums", counted("sums", sums, 2 if first else 0))
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(checkpoint, tmp_path / "out", config)
    kept = Checkpoints(tmp_path / "out.run").newest_whole()
    assert kept.shot == 1
    assert (kept.report.shots[0].perplexity is None) == first
    report = prune_checkpoint(checkpoint, tmp_path / "out", config)
    assert without_times(report) == without_times(whole)


@pytest.mark.parametrize(
    "where", ["export", "export/inside", "shot-9.safetensors", "run.json", "shot-2.safetensors.partial"]
)
def test_what_a_link_leads_to_is_left_alone(text_file, checkpoint, tmp_path, ended, where):
    """Others may write to the directory: a link that they put into the run is not written or emptied through."""
    config = recipe(text_file, sparsity=0.4)
    ended(checkpoint, tmp_path / "whole", config, 0)
    ended(checkpoint, tmp_path / "out", config, 1)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    link = tmp_path / "out.run" / where
    link.parent.mkdir(exist_ok=True)
    if link.exists():
        link.unlink()
    link.symlink_to(precious if "export" in where else precious / "file")
    ended(checkpoint, tmp_path / "out", config, 0)
    assert [path.name for path in precious.iterdir()] == ["file"]
    assert (precious / "file").read_text() == "precious"
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_run_directory_that_is_a_link_is_refused(text_file, checkpoint, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "out.run").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="is a link"):
        prune_checkpoint(checkpoint, tmp_path / "out", recipe(text_file))
    assert not list((tmp_path / "precious").iterdir())


def changed(path, change):
    """Change a checkpoint's tensors, with the checksum that fits."""
    tensors = change(load_file(path / "shot-1.safetensors"))
    save_file(tensors, path / "shot-1.safetensors")
    digest = hashlib.sha256((path / "shot-1.safetensors").read_bytes()).hexdigest()
    lines = (path / "shot-1.sha256").read_text().splitlines()
    kept = [line for line in lines if not line.endswith("safetensors")]
    (path / "shot-1.sha256").write_text("\n".join([f"{digest}  shot-1.safetensors", *kept, ""]))


WRONG = {
    "none": lambda tensors: {"x": torch.ones(1)},
    "a matrix less": lambda tensors: {n: t for n, t in tensors.items() if "down_proj" not in n},
    "another shape": lambda tensors: {n: t[:1] if n.startswith("weight/") else t for n, t in tensors.items()},
    "another type": lambda tensors: {n: t.float() if n.startswith("rows/") else t for n, t in tensors.items()},
    "all removed": lambda tensors: {n: t & False if n.startswith("rows/") else t for n, t in tensors.items()},
    "not a number": lambda tensors: {n: t * torch.nan if n.startswith("weight/") else t for n, t in tensors.items()},
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_checkpoint_with_a_right_checksum_and_wrong_contents_is_an_error(
    kind, text_file, checkpoint, tmp_path, ended
):
    config = recipe(text_file, sparsity=0.4)
    ended(checkpoint, tmp_path / "out", config, 1)
    changed(tmp_path / "out.run", WRONG[kind])
    with pytest.raises(OutputError, match=r"shot-1\.safetensors does not hold what .* Remove"):
        prune_checkpoint(checkpoint, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()
