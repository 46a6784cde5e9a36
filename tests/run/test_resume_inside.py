"""A run that was ended inside a shot goes on from the last state kept there, to the same weights bit for bit."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llm_surgeon import PruneConfig, prune_checkpoint
from llm_surgeon.cli.prune import _how_to_go_on
from llm_surgeon.records import NoWords, PruneReport, RemovalMark
from llm_surgeon.session import marks as marks_module
from llm_surgeon.session.marks import Marks
from quick import without_what_has_other_tests
from tiny import build, tokenizer

SMALL = {
    "samples": 8,
    "seq_len": 16,
    "batch_size": 2,
    "eval_window": 32,
    "eval_tokens": 64,
    "shots": 1,
    "sparsity": 0.3,
    "precision": "float32",
    "structure": "rows-columns",
}
# Recipes with all kinds of fits, in all orders and on all kinds of weights.
RECIPES = {
    "best": {"preset": "best"},
    "best, neurons and heads, layer by layer": {"preset": "best", "structure": "neurons+heads", "order": "layer-major"},
    "best, streamed": {"preset": "best", "order": "layer-major", "weights": "streamed"},
    "no cross-fitting": {"preset": "none", "reconstruction": True, "reconstruction_copies": 1, "gate_steps": 2},
    "corrections": {"preset": "fast", "lora": True, "lora_steps": 3},
    "two shots": {"preset": "none", "shots": 2, "gate_steps": 2},
    "layer-wise": {"preset": "none", "method": "wanda", "structure": "unstructured", "lora": True, "lora_steps": 3},
}


class EndedError(Exception):
    """The end of a process."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    without_what_has_other_tests(monkeypatch)
    # States are kept as often as possible, rather than once a minute.
    monkeypatch.setattr(marks_module, "WORTH", 0.0)
    monkeypatch.setattr(marks_module, "OFTEN", 0.0)


@pytest.fixture
def ends(monkeypatch):
    """Counts the states that a run keeps, and ends it after one of them."""
    write, state = Marks.write, {"kept": 0, "end": None}

    def counted(self, *given):
        write(self, *given)
        state["kept"] += 1
        if state["kept"] == state["end"]:
            raise EndedError

    monkeypatch.setattr(Marks, "write", counted)

    def run(source, out, config, end=None):
        state.update(kept=0, end=end)
        if end is None:
            prune_checkpoint(source, out, config)
            return state["kept"]
        with pytest.raises(EndedError):
            prune_checkpoint(source, out, config)
        assert not out.exists()
        return end

    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    build("llama-biased").save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def recipe(text_file, **changes):
    return PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), **changes})


def weights(out):
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


@pytest.mark.parametrize("name", RECIPES)
def test_each_state_leads_to_the_same_weights(source, text_file, tmp_path, ends, name):
    config = recipe(text_file, **RECIPES[name])
    kept = ends(source, tmp_path / "whole", config)
    expected = weights(tmp_path / "whole")
    assert kept >= (name != "layer-wise") + 1
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "text.txt"}

    for end in range(1, kept + 1):
        out = tmp_path / f"ended-{end}"
        ends(source, out, config, end)
        ends(source, out, config)
        assert weights(out) == expected, f"after state {end} of {kept}"


def test_a_damaged_state_is_not_used(source, text_file, tmp_path, ends, caplog):
    config = recipe(text_file, preset="best")
    ends(source, tmp_path / "whole", config)
    # The states are: the removals, seven blocks and steps of the first half, and two files of the second half's first.
    for name in ("removals", "first", "fits"):
        out = tmp_path / name
        ends(source, out, config, 12)
        path = out.with_name(f"{name}.run") / f"inside-{name}.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        caplog.clear()

        ends(source, out, config)

        assert f"({path.name}), and is not used" in caplog.text
        assert weights(out) == weights(tmp_path / "whole")


def test_states_of_other_words_are_not_used(source, text_file, tmp_path, ends, caplog):
    """As another version of the package might have written them; with the right checksum."""
    config = recipe(text_file, preset="fast")
    ends(source, tmp_path / "whole", config)
    out = tmp_path / "out"
    ends(source, out, config, 3)
    path = out.with_name("out.run") / "inside-fits.safetensors"
    save_file({"0": torch.zeros(1)}, path, metadata={"words": "{}"})
    path.with_suffix(".sha256").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")

    ends(source, out, config)

    assert "of another version (inside-fits.safetensors)" in caplog.text
    assert weights(out) == weights(tmp_path / "whole")


def test_what_was_stopped_says_where_it_continues(source, text_file, tmp_path, ends, caplog):
    ends(source, tmp_path / "out", recipe(text_file, preset="fast"), 2)

    assert "the same command continues inside shot 1" in caplog.text
    assert "continues inside shot 1" in _how_to_go_on(tmp_path / "out")


def test_the_removals_are_kept_in_a_short_run_too(source, text_file, tmp_path, monkeypatch, ends):
    """Only states of the fits are rare."""
    monkeypatch.setattr(marks_module, "OFTEN", 60.0)
    assert ends(source, tmp_path / "out", recipe(text_file, preset="best")) == 1
    assert ends(source, tmp_path / "none", recipe(text_file, preset="none")) == 0


def test_the_report_has_the_time_of_all_processes(source, text_file, tmp_path, ends):
    out = tmp_path / "out"
    ends(source, out, recipe(text_file, preset="fast"), 1)
    path = out.with_name("out.run") / "inside-removals.safetensors"
    with safe_open(path, framework="pt") as file:
        before = RemovalMark.model_validate_json(file.metadata()["words"]).spent

    ends(source, out, recipe(text_file, preset="fast"))

    (shot,) = PruneReport.model_validate_json((out / "report.json").read_text(encoding="utf8")).shots
    assert [stage.name for stage in shot.stages][:3] == [stage.name for stage in before.stages]
    for stage in before.stages:
        assert shot.seconds_of(stage.name) == stage.seconds > 0
    assert shot.profile["factor sums"] >= before.profile["factor sums"] > 0
    assert all(stage.seconds > 0 for stage in shot.stages)


def test_without_room_on_the_disk_nothing_is_kept(source, text_file, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Marks, "_room", lambda self: 1000)

    prune_checkpoint(source, tmp_path / "out", recipe(text_file, preset="fast"))

    assert "no state inside the shot is kept" in caplog.text
    assert (tmp_path / "out" / "report.json").exists()


def test_states_are_kept_once_a_minute_and_take_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(marks_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(marks_module, "OFTEN", 60.0)
    monkeypatch.setattr(marks_module, "WORTH", 20.0)
    marks = Marks(tmp_path)

    def slow():
        now[0] += 10
        return {"0": torch.zeros(1)}

    now[0] = 100.0
    assert not marks.due(), "states of fits are of no use without the removals"
    marks.write(marks_module.REMOVALS, dict, NoWords())
    assert not marks.due()
    now[0] = 160.0
    assert marks.due()
    marks.write("fits", slow, NoWords())
    for passed, due in ((60, False), (199, False), (200, True)):
        now[0] = 170.0 + passed
        assert marks.due() == due
    for name in ("first", "fits"):
        marks.write(name, slow, NoWords())
    for passed, due in ((399, False), (400, True)):
        now[0] = 390.0 + passed
        assert marks.due() == due, "the time of both counts"
    assert not Marks().due()
