"""Blocks of docs/after-pruning.md: those that the development environment runs do so, on a tiny model.

``benchmarks/after_pruning.py`` runs all of them on a real one.
"""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_models import narrowed
from llm_surgeon.export.save import save_model
from llm_surgeon.recipe.quantised import QUANTISED

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
from after_pruning import ELSEWHERE, HERE, PAGE, PROGRAMS, Block, Runner, blocks_of

BLOCKS = blocks_of()


@pytest.fixture
def runner(tmp_path):
    """A directory with two exports, in which blocks are run."""
    for name, uniform in (("smaller", False), ("plain", True)):
        made = narrowed("llama", structure="neurons+heads", uniform=uniform)
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("A card.\n")
        assert save_model(made.model, made.tokenizer, made.anatomy, made.keep, tmp_path / name).plain == uniform
    running = Runner(tmp_path, dict.fromkeys(HERE, sys.executable))
    yield running
    running.close()


def outcomes_of(runner, *names):
    return [runner.run(block) for block in BLOCKS if block.name in names]


@pytest.mark.slow
def test_exports_generate_and_are_converted_and_llama_cpp_writes_the_same_text(runner, tmp_path):
    pytest.importorskip("xllamacpp", reason="the engine of GGUF files is not installed")
    outcomes = outcomes_of(runner, "llm-surgeon", "transformers", "xllamacpp")
    assert [each.outcome for each in outcomes] == ["passed"] * 3
    assert (tmp_path / "smaller" / "gguf" / "model-F32.gguf").exists()
    assert (tmp_path / "plain" / "nemotron-nas" / "config.json").exists()


def test_adapters_are_trained_and_merged(runner, tmp_path):
    pytest.importorskip("peft", reason="adapters need it")
    (outcome,) = outcomes_of(runner, "peft")
    assert outcome.outcome == "passed"
    assert "largest difference" in outcome.said
    assert (tmp_path / "tuned" / "modeling_pruned.py").exists()


def test_what_is_uploaded(runner, tmp_path):
    (tmp_path / "smaller" / "gguf").mkdir()
    (tmp_path / "smaller" / "gguf" / "model-F32.gguf").write_bytes(b"")
    (outcome,) = outcomes_of(runner, "upload")
    assert outcome.outcome == "passed"
    names = outcome.said.split()
    assert {"config.json", "model.safetensors", "modeling_pruned.py", "tokenizer.json"} <= set(names)
    assert not [name for name in names if "gguf" in name]


def test_every_block_is_marked_and_of_a_known_environment():
    fences = re.findall(r"^ *```", PAGE.read_text(encoding="utf8"), re.MULTILINE)
    assert len(fences) == 2 * len(BLOCKS)
    assert {block.name for block in BLOCKS} == {*HERE, *ELSEWHERE, *PROGRAMS}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"{block.section}-{block.name}")
def test_blocks_are_of_their_language(block):
    if block.language == "python":
        compile(block.code, block.name, "exec")
    else:
        subprocess.run(["bash", "-n", "-c", block.code], check=True)


def block(code, name="transformers", language="python", **more):
    return Block(name, language, code, **({"port": None, "same": False, "section": "none"} | more))


def test_what_fails_is_said(runner):
    assert runner.run(block("raise ValueError('no such thing')")).outcome == "failed: ValueError: no such thing"
    assert runner.run(block("exit 3", language="sh")).outcome == "failed: exit status 3"
    assert runner.run(block("print(1)", name="vllm")).outcome == "not run"
    ended = runner.run(block("exit 0", language="sh", port=9))
    assert ended.outcome == "failed: the server does not answer"


def test_texts_have_to_be_the_same(runner):
    outcomes = [runner.run(block(f"print({text!r})", same=True)).outcome for text in ("a b", "say: a b", "a c", "")]
    assert outcomes == ["passed", "passed", "failed: another text than 'a b'", "failed: another text than 'a b'"]


def test_a_server_stays_until_the_next_block_has_run(runner, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "health").write_text("well")
    serve = block(f"exec python -m http.server {port} --bind 127.0.0.1", language="sh", port=port)
    ask = block(f"import urllib.request\nprint(urllib.request.urlopen('http://127.0.0.1:{port}/health').status)")
    outcomes = [runner.run(each) for each in (serve, ask, ask)]
    assert [each.outcome.partition(":")[0] for each in outcomes] == ["passed", "passed", "failed"]
    assert outcomes[1].said == "200"


def test_fallbacks_are_those_of_the_types():
    text = " ".join(PAGE.read_text(encoding="utf8").split())
    (told,) = re.findall(r"become larger: (.+?);", text)
    found = {}
    for clause in told.replace("fall back to", "to").split(", "):
        names, _, fallback = clause.partition(" to ")
        found |= dict.fromkeys(names.lower().split(" and "), fallback)
    assert found == {name: kind.fallback for name, kind in QUANTISED.items() if kind.block == 256}
