"""What goes along with the weights: byte for byte what the dense checkpoint has, and nothing that leads nowhere."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import quick
import tiny
from llm_surgeon import load, prune_checkpoint
from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.export.companions import copy_companions
from llm_surgeon.export.save import save_model
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.loading import load_tokenizer
from llm_surgeon.system.files import readable_as_others

SMALL = {
    **{"sparsity": 0.3, "samples": 4, "seq_len": 16, "evaluation": "none", "preset": "none", "shots": 1},
}


@pytest.fixture
def source(checkpoint, tmp_path):
    """A copy of the tiny checkpoint with what checkpoints of the hub have besides."""
    path = shutil.copytree(checkpoint, tmp_path / "source")
    licences = "LICENSE", "NOTICE.txt", "License.md", "USE_POLICY.md"
    for name in (*licences, "preprocessor_config.json", "chat_template.jinja", "merges.txt", "tokenizer.model.v3"):
        (path / name).write_text(f'{{"made by hand": "{name}"}} \n\n')
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    # As no version of transformers writes it.
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=7) + "\n\n")
    return path


@pytest.mark.parametrize("structure", ["rows-columns", "2:4"])
def test_what_pruning_does_not_change_is_copied_byte_for_byte(source, text_file, tmp_path, monkeypatch, structure):
    quick.without_what_has_other_tests(monkeypatch)
    options = {**SMALL, "structure": structure, "sparsity": 0.5, "calibration": str(text_file)}
    prune_checkpoint(source, tmp_path / "out", options)
    own = {"config.json", "model.safetensors"}
    for path in source.rglob("*"):
        if path.is_file() and path.name not in own:
            assert (tmp_path / "out" / path.relative_to(source)).read_bytes() == path.read_bytes(), path.name
    reloaded = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=structure == "rows-columns")
    assert reloaded("w3 w4").input_ids == [3, 4]


def test_code_of_a_tokenizer_goes_along_and_nothing_from_elsewhere(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (tmp_path / "outside.py").write_text("outside")
    for name in ("words.py", "modeling.py"):
        (source / name).write_text(name)
    names = ["words.Words", "owner/repository--others.Words", "../outside.Words", None, 3]
    (source / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": names}}))
    assert copy_companions(source, out)
    assert {path.name for path in out.iterdir()} == {"tokenizer_config.json", "words.py"}


def bpe(text):
    """A tokenizer that keeps up to three digits together."""
    core = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([text], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_a_class_that_splits_otherwise_than_its_file_is_warned_of(tmp_path, caplog):
    tiny.llama_like(Qwen2Config, Qwen2ForCausalLM, vocab_size=320, head_dim=6).save_pretrained(tmp_path)
    bpe("in 2023 the cat and 650 dogs sat\n" * 100).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", "llm_surgeon"):
        load_tokenizer(str(tmp_path))
    assert "splits text otherwise than tokenizer.json: 'in 2023, 650 dogs' into" in caplog.text


def test_a_class_that_splits_as_its_file_does_is_not(checkpoint, caplog):
    with caplog.at_level("WARNING", "llm_surgeon"):
        load_tokenizer(str(checkpoint))
    assert not caplog.records


def own_code(path):
    settings = json.loads((path / "config.json").read_text())
    settings["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (path / "config.json").write_text(json.dumps(settings))
    code = "from transformers import LlamaForCausalLM\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    (path / "modeling_own.py").write_text(code)


def test_a_plain_export_does_not_ask_for_code_that_stayed_behind(source, text_file, tmp_path, monkeypatch):
    quick.without_what_has_other_tests(monkeypatch)
    own_code(source)
    options = {**SMALL, "structure": "2:4", "sparsity": 0.5, "calibration": str(text_file)}
    prune_checkpoint(source, tmp_path / "out", options)
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    for trusted in (False, True):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=trusted)
    with pytest.raises(UnsupportedModelError, match="run by code that its checkpoint brings"):
        prune_checkpoint(source, tmp_path / "trusted", {**options, "trust_remote_code": True})


@pytest.mark.parametrize("file", [True, False])
def test_settings_of_generation_that_transformers_would_not_write_are_kept(
    source, text_file, tmp_path, monkeypatch, file
):
    """Many checkpoints of the hub have such; they are found out only when a model is saved."""
    quick.without_what_has_other_tests(monkeypatch)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**settings, "temperature": 0.7, "do_sample": True}))
    generation = source / "generation_config.json"
    generation.unlink()
    if file:
        generation.write_text('{"temperature": 0.5, "do_sample": false, "top_p": 7}')
    prune_checkpoint(source, tmp_path / "out", {**SMALL, "calibration": str(text_file)})
    written = tmp_path / "out" / "generation_config.json"
    if file:
        assert written.read_bytes() == generation.read_bytes()
    else:
        assert json.loads(written.read_text())["temperature"] == 0.7


def test_a_model_with_such_settings_of_its_own_is_written_and_loads(tmp_path):
    model = tiny.build("llama")
    model.config.temperature, model.generation_config.top_p = 0.7, 7.0
    anatomy = examine(model, family_of("llama"))
    save_model(model, tiny.tokenizer(), anatomy, anatomy.dense_masks(), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["temperature"] == 0.7
    assert json.loads((tmp_path / "generation_config.json").read_text())["top_p"] == 7.0
    assert (model.config.temperature, model.generation_config.top_p) == (0.7, 7.0)
    load(tmp_path, device="cpu")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path, mask):
    model = tiny.build("llama")
    anatomy = examine(model, family_of("llama"))
    before = os.umask(mask)
    try:
        save_model(model, tiny.tokenizer(), anatomy, anatomy.dense_masks(), tmp_path)
        readable_as_others(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_no_matrix_without_rows_or_columns_is_written(tmp_path, text_file):
    """Quantisers make noise of those. With a bias, what is left of the layer is its bias."""
    for family in ("llama", "opt"):
        model = tiny.build(family)
        path = tmp_path / family
        model.save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
        options = {**SMALL, "structure": "blocks", "sparsity": 0.5, "calibration": str(text_file), "min_width": 0.0}
        report = prune_checkpoint(path, tmp_path / f"{family}-out", options)
        assert any(not layer.weights for layer in report.layers), "nothing is emptied"
        state = load_file(tmp_path / f"{family}-out" / "model.safetensors")
        assert all(tensor.numel() for tensor in state.values())
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-out", trust_remote_code=True)
        linears = [module for module in loaded.modules() if isinstance(module, torch.nn.Linear)]
        assert all(module.weight.numel() for module in linears)
        assert sum(parameter.numel() for parameter in loaded.parameters()) == report.shots[-1].size.total
