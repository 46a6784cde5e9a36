"""What the frontier benchmark reads from the tools of llama.cpp, and which rows it says are best."""

import json
import sys
from pathlib import Path

import pytest

# The parts of a benchmark import each other as files beside them.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import frontier
from frontier_report import markdown, ratio, rows_of, unbeaten
from llama_tools import ToolError, cache_bytes, fallbacks_of, milliseconds_of, perplexity_of, version_of

TWO = ("f16", "q8_0")
QUANTISED = """\
main: quantizing 'in.gguf' to 'out.gguf' as Q4_K_M using 2 threads
[   1/   4]    token_embd.weight - [  576, 100,     1,     1], type =    f16, size =  1.000 MiB
warning: token_embd.weight                    - ncols    576 not divisible by 256 (required for type    q6_K) -> \
falling back to    q8_0
warning: blk.0.attn_k.weight                  - ncols    576 not divisible by 256 (required for type    q4_K) -> \
falling back to    q5_0
warning: blk.0.ffn_down.weight                - ncols     40 not divisible by 256 (required for type    q4_K) \
(WARNING: must use F16 due to unusual shape) -> falling back to     f16
"""


def bench(*runs):
    return json.dumps([{"n_prompt": p, "n_gen": n, "samples_ns": samples} for p, n, samples in runs])


def test_fallbacks_are_counted_by_kind():
    said = f"{QUANTISED}llama_model_quantize_impl: WARNING: 3 of 4 tensor(s) required fallback quantization\n"
    kinds = {"q6_K -> q8_0": 1, "q4_K -> q5_0": 1, "q4_K -> f16": 1}
    assert fallbacks_of(said) == {"fallbacks": 3, "kinds": kinds}
    # The tensors named once more by a second pass over them.
    assert fallbacks_of(QUANTISED + said)["fallbacks"] == 3


def test_a_file_without_fallbacks_has_none():
    assert fallbacks_of("llama_model_quantize_impl: quant size  = 100.00 MiB\n") == {"fallbacks": 0, "kinds": {}}


@pytest.mark.parametrize(
    "said",
    [QUANTISED, f"{QUANTISED}WARNING: 4 of 4 tensor(s) required fallback", "1 of 4 tensor(s) required fallback"],
    ids=["no sum", "another sum", "no names"],
)
def test_fallbacks_that_do_not_add_up_are_an_error(said):
    with pytest.raises(ToolError, match="counts"):
        fallbacks_of(said)


def test_perplexity_and_its_error():
    said = "perplexity: calculating perplexity over 2 chunks, n_ctx=512\n[1]15.0,[2]17.25,\n"
    assert perplexity_of(f"{said}Final estimate: PPL = 17.2500 +/- 0.51234\n", 2) == {
        "perplexity": 17.25,
        "error": 0.51234,
    }
    with pytest.raises(ToolError, match="no estimate"):
        perplexity_of(said, 2)
    with pytest.raises(ToolError, match="2 windows instead of 3"):
        perplexity_of(f"{said}Final estimate: PPL = 17.2500 +/- 0.51234\n", 3)


def test_milliseconds_for_a_token():
    said = bench((512, 0, [1_024_000_000]), (0, 64, [640_000_000]))
    assert milliseconds_of(said, 512, 64) == {"prefill": 2.0, "decode": 10.0}


@pytest.mark.parametrize(
    "runs",
    [
        [(512, 0, [1])],
        [(512, 0, [1]), (0, 128, [1])],
        [(512, 0, [1, 2]), (0, 64, [1])],
        [(512, 0, [1]), (512, 0, [1]), (0, 64, [1])],
    ],
    ids=["one missing", "another length", "two samples", "twice"],
)
def test_other_runs_than_those_asked_for_are_an_error(runs):
    with pytest.raises(ToolError, match="not one run"):
        milliseconds_of(bench(*runs), 512, 64)


def test_version():
    assert version_of("load_backend: cpu\nversion: 0.6.0 (build 7, commit abc)\nbuilt with gcc\n") == (
        "0.6.0 (build 7, commit abc)"
    )
    with pytest.raises(ToolError, match="version"):
        version_of("usage: tool")


def test_cache_of_one_token():
    keys = {
        "general.architecture": "llama",
        "llama.block_count": 30,
        "llama.embedding_length": 576,
        "llama.attention.head_count": 9,
        "llama.attention.head_count_kv": 3,
    }
    # Keys and values of 30 blocks, 3 heads of 64 dimensions, 2 bytes each.
    assert cache_bytes(keys) == 2 * 30 * 3 * 64 * 2
    assert (
        cache_bytes({**keys, "llama.attention.key_length": 32, "llama.attention.value_length": 16}) == 30 * 3 * 48 * 2
    )
    without = {name: value for name, value in keys.items() if not name.endswith("kv")}
    assert cache_bytes(without) == 2 * 30 * 9 * 64 * 2
    assert cache_bytes({**keys, "llama.attention.sliding_window": 512}) is None


def test_cache_of_layers_that_differ():
    keys = {
        "general.architecture": "deci",
        "deci.block_count": 3,
        "deci.attention.head_count": [9, 6, 0],
        "deci.attention.head_count_kv": [3, 2, 0],
        "deci.attention.key_length": 64,
        "deci.attention.value_length": 64,
    }
    assert cache_bytes(keys) == (3 + 2) * (64 + 64) * 2


def cell(kind, perplexity, size, speed, structure="", load=2.0):
    return {
        "model": structure or "dense",
        "structure": structure,
        "uniform": False,
        "asked": 0.0,
        "removed": 0.2 if structure else 0.0,
        "type": kind,
        "file": {"bytes": size, "parameters": 9, "fallbacks": 1, "kinds": {"q4_K -> q5_0": 1}, "cache_bytes": 1000}
        | {"types": {"Q5_0": 1, "F32": 3}},
        "perplexity": {"perplexity": perplexity, "error": 0.1},
        "speed": speed and {"samples": speed, "load": load, "threads": 2},
    }


def samples(prefill, decode):
    return {"prefill": prefill, "decode": decode}


def test_a_pruned_file_has_the_dense_rate_times_their_ratio():
    alone = {"dense": samples([2.0, 2.0, 2.0], [10.0, 10.0, 10.0])}
    # The machine was half as fast when the pruned file was measured.
    pair = {
        "dense": samples([4.0, 4.0, 9.0], [20.0, 20.0, 20.0]),
        "pruned": samples([2.0, 2.0, 9.0], [16.0, 16.0, 16.0]),
    }
    dense, pruned = rows_of([cell("q8_0", 20.0, 100, alone), cell("q8_0", 24.0, 80, pair, "neurons", load=3.5)])
    assert (dense["prefill_ms"], dense["prefill_ratio"], dense["loaded"]) == (2.0, 1.0, False)
    assert (pruned["prefill_ms"], pruned["prefill_ratio"], pruned["loaded"]) == (1.0, 2.0, True)
    assert (pruned["decode_ms"], pruned["decode_ratio"]) == (8.0, 1.25)
    assert pruned["tensors"] == 4


def test_rows_that_no_other_beats_are_named():
    fast, slow = {"dense": samples([1.0], [1.0])}, {"dense": samples([3.0], [1.0])}
    pair = {"dense": samples([1.0], [1.0]), "pruned": samples([0.5], [1.0])}
    rows = rows_of(
        [cell("q8_0", 20.0, 100, fast), cell("q4_k_m", 21.0, 60, slow), cell("q8_0", 24.0, 80, pair, "neurons")]
    )
    assert [row["best"] for row in rows] == [["size", "prefill"], ["size"], ["prefill"]]


def test_unbeaten_points():
    assert unbeaten([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1)]) == [0, 1, 4]
    assert unbeaten([(1, 1), (1, 1)]) == [0, 1]


def test_ratio_is_of_each_round():
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == 2.0
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_the_table_tells_a_loaded_machine_and_fallbacks():
    alone = {"dense": samples([2.0], [10.0])}
    result = {
        "llama.cpp": "1",
        "date": "today",
        "machine": "one",
        "threads": 2,
        "command": "command",
        "missing": 3,
        "settings": {"model": "demo", "cache_tokens": 1000, "chunks": 2, "context": 512, "text": "text", "repeats": 1},
    }
    idle = markdown({**result, "rows": rows_of([cell("q4_k_m", 20.0, 100_000_000, alone)])})
    assert (
        "| dense | q4_k_m | 100.0 MB | 1 of 4 | 20.00 | 500 | 1.00 | 100.0 | 1.00 | 1.0 MB | size and prefill |" in idle
    )
    assert "q4_k_m 1 x q4_K -> q5_0" in idle
    assert "3 rows are missing" in idle
    assert "loaded" not in idle
    busy = markdown({**result, "rows": rows_of([cell("q4_k_m", 20.0, 100_000_000, alone, load=3.0)])})
    assert "500*" in busy
    assert "The machine was loaded" in busy
    untimed = markdown({**result, "rows": rows_of([cell("q4_k_m", 20.0, 100_000_000, None)])})
    assert "| 20.00 | - | - | - | - | 1.0 MB | size |" in untimed


class Fake:
    """Tools whose perplexity is the number of the call; ``calls`` has what they were asked."""

    threads = 2

    def __init__(self):
        self.calls = []

    def quantise(self, source, target, kind):
        assert source.exists()
        target.write_text(kind)
        self.calls.append(f"quantise {target.stem}")
        return {"fallbacks": 0, "kinds": {}}

    def perplexity(self, file, text, context, chunks):
        assert file.exists()
        self.calls.append(f"perplexity {file.stem}")
        return {"perplexity": float(len(self.calls)), "error": 0.1}

    def speed(self, file, prompt, generate):
        assert file.exists()
        self.calls.append(f"speed {file.stem}")
        return {"prefill": 2.0, "decode": 10.0}


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A comparison of a model that needs neither llama.cpp nor pruning; gives what makes one, and what is written."""
    written = {}

    def call(arguments):
        if arguments[0] == "export":
            (Path(arguments[3]) / "gguf-f16").mkdir(parents=True)
            (Path(arguments[3]) / "gguf-f16" / "model.gguf").write_text("f16")

    monkeypatch.setattr(frontier, "call", call)
    monkeypatch.setattr(frontier, "removed_share", lambda model: model.sparsity)
    monkeypatch.setattr(
        frontier, "described", lambda file: {"bytes": 1, "parameters": 1, "cache_bytes": 1, "types": {"F16": 1}}
    )
    monkeypatch.setattr(frontier, "write", lambda name, result, text: written.update(result))
    monkeypatch.setattr(frontier, "save", lambda *arguments, **named: None)
    place = tmp_path / "exports" / "neurons-uniform"
    place.mkdir(parents=True)
    (place / "report.json").write_text("{}")

    def work(*more):
        arguments = ["demo", "--out", str(tmp_path), "--sparsities", "0.1", "0.2", "--structures", "neurons"]
        monkeypatch.setattr(sys, "argv", ["frontier.py", *arguments, "--uniform", "yes", "--repeats", "2", *more])
        return frontier.Work(frontier.options_given(), Fake(), tmp_path / "text")

    return work, written


def test_a_second_call_does_what_is_missing_and_no_more(fake):
    work, written = fake
    first = work("--types", "f16", "q8_0", "--untimed")
    frontier.run(first, "1")
    files = [f"{name}.{kind}" for name in ("dense", "neurons-uniform-10", "neurons-uniform-20") for kind in TWO]
    assert [said for said in first.tools.calls if said.startswith("perplexity")] == [f"perplexity {f}" for f in files]
    assert not [said for said in first.tools.calls if said.startswith("speed")]
    assert not list((first.place / "files").iterdir())
    again = work("--types", "f16", "q8_0", "--untimed")
    frontier.run(again, "1")
    assert again.tools.calls == []
    timed = work("--types", "f16", "q8_0")
    frontier.run(timed, "1")
    assert not [said for said in timed.tools.calls if said.startswith("perplexity")]
    speeds = [said.removeprefix("speed ") for said in timed.tools.calls if said.startswith("speed")]
    # There and back, the dense files together, each other one with the dense one of its type.
    pair = ["dense.f16", "neurons-uniform-10.f16"]
    assert speeds[:8] == ["dense.f16", "dense.q8_0", "dense.q8_0", "dense.f16", *pair, *pair[::-1]]
    assert len(speeds) == 4 * 5
    assert [(row["model"], row["type"]) for row in written["rows"]] == [tuple(f.split(".")) for f in files]
    assert all(row["prefill_ms"] == 2.0 for row in written["rows"])


def test_a_call_with_less_keeps_the_rows_of_the_others(fake):
    work, written = fake
    frontier.run(work("--types", "f16", "q8_0", "--untimed"), "1")
    frontier.run(work("--types", "q8_0", "--untimed", "--structures"), "1")
    assert len(written["rows"]) == 6
    assert written["missing"] == 0


def test_speeds_of_a_loaded_machine_are_measured_again_when_asked(fake, monkeypatch):
    work, written = fake
    monkeypatch.setattr(frontier.os, "getloadavg", lambda: (5.0, 5.0, 5.0))
    frontier.run(work("--types", "q8_0"), "1")
    assert all(row["loaded"] for row in written["rows"])
    monkeypatch.setattr(frontier.os, "getloadavg", lambda: (2.0, 5.0, 5.0))
    frontier.run(work("--types", "q8_0"), "1")
    assert all(row["loaded"] for row in written["rows"])
    frontier.run(work("--types", "q8_0", "--retime"), "1")
    assert not any(row["loaded"] for row in written["rows"])


def test_other_settings_are_refused(fake, tmp_path):
    work, _ = fake
    options, text, other = work().options, tmp_path / "text", tmp_path / "other"
    text.write_text("text")
    other.write_text("other")
    frontier.agree(options, text, "1")
    frontier.agree(options, text, "1")
    for given in ((work("--context", "512").options, text, "1"), (options, other, "1"), (options, text, "2")):
        with pytest.raises(SystemExit, match="other settings"):
            frontier.agree(*given)
