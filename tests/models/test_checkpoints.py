"""Checkpoints as strangers have them: what cannot be loaded is refused by name, before any weight is read."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tiny
from llm_surgeon import load
from llm_surgeon.cli import app
from llm_surgeon.errors import ModelError, UnsupportedModelError
from llm_surgeon.models.loading import load_model
from llm_surgeon.models.skeleton import skeleton_of
from llm_surgeon.recipe.config import PruneConfig


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of the tiny checkpoint that may be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "copy")


def edit(path, **entries):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def change_weights(path, change):
    file = path / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


WEIGHTS = {
    "one tensor less": (without("model.layers.1.mlp.down_proj.weight"), r"lacks model\.layers\.1\.mlp\.down_proj"),
    "a wrapper's prefix": (
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        r"lacks .*; nothing takes its _orig_mod\.",
    ),
    "another class": (lambda state: {**state, "score.weight": torch.ones(2, 24)}, "nothing takes its score.weight"),
    "another shape": (
        lambda state: {**state, "model.norm.weight": torch.ones(3)},
        r"wrong shape of model\.norm\.weight \[3\] instead of",
    ),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_that_are_not_those_of_the_model_are_refused_by_name(copy, kind):
    change, message = WEIGHTS[kind]
    change_weights(copy, change)
    for refuse in (lambda: load(copy, device="cpu"), lambda: skeleton_of(str(copy), PruneConfig())):
        with pytest.raises(ModelError, match=message):
            refuse()


@pytest.mark.parametrize(("change", "message"), [(1, r"lacks model\.layers"), (-1, r"nothing takes its model\.layers")])
def test_a_block_more_or_fewer_in_the_configuration_is_refused(copy, change, message):
    edit(copy, num_hidden_layers=json.loads((copy / "config.json").read_text())["num_hidden_layers"] + change)
    with pytest.raises(ModelError, match=message):
        load(copy, device="cpu")


def test_a_head_that_another_class_did_not_save_is_missing(tmp_path):
    tiny.llama(tie_word_embeddings=False).save_pretrained(tmp_path)
    change_weights(tmp_path, without("lm_head.weight"))
    with pytest.raises(ModelError, match=r"lacks lm_head\.weight"):
        load_model(str(tmp_path))


def test_what_transformers_renames_is_not_missing(copy):
    """Saved from the base model, names lack its prefix; old checkpoints hold buffers that nothing takes any more."""
    expected = load(copy, device="cpu")[0].state_dict()
    change_weights(
        copy,
        lambda state: (
            {key.removeprefix("model."): value for key, value in state.items()}
            | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
        ),
    )
    loaded = load(copy, device="cpu")[0].state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


@pytest.mark.parametrize("command", ["prune", "plan", "eval", "bench", "compare"])
def test_every_command_refuses_missing_weights(copy, text_file, tmp_path, command):
    change_weights(copy, without("model.layers.0.mlp.up_proj.weight"))
    text = ["--calibration", str(text_file), "--samples", "2", "--seq-len", "16"]
    out = ["--out", str(tmp_path / "out")]
    arguments = {
        "prune": [*out, *text],
        "plan": text,
        "eval": ["--data", str(text_file), "--window", "16"],
        "bench": ["--prompt", "8", "--generate", "2"],
        "compare": [*out, *text, "--methods", "magnitude", "--eval-window", "16"],
    }[command]
    result = CliRunner().invoke(app, [command, str(copy), *arguments])
    assert result.exit_code == 1
    assert "it lacks model.layers.0.mlp.up_proj.weight" in " ".join(result.output.split())


CONFIGURATIONS = {
    "hidden_size": (2**31, "wrong shape"),
    "vocab_size": (2**40, "wrong shape"),
    "num_hidden_layers": (2**31, "no model has more than 10,000 blocks"),
    "num_attention_heads": (0, "cannot be loaded"),
    "hidden_act": ("nothing", "cannot be loaded"),
    "intermediate_size": ("wide", "cannot be loaded"),
    "pad_token_id": (tiny.VOCABULARY, "Padding_idx"),
    "rope_parameters": ({"rope_type": "none of these"}, "cannot be loaded"),
    "model_type": (["llama"], "cannot be loaded"),
    "max_position_embeddings": (-1, "max_position_embeddings is -1"),
    "dtype": ("float8_e4m3fn", "--dtype float32"),
}


@pytest.mark.parametrize("entry", CONFIGURATIONS)
def test_a_configuration_that_describes_no_model_is_refused_by_name(copy, entry):
    value, message = CONFIGURATIONS[entry]
    edit(copy, **{entry: value})
    with pytest.raises(ModelError, match=message):
        load(copy, device="cpu")


def test_more_blocks_than_tensors_are_refused_before_they_are_built(copy):
    edit(copy, num_hidden_layers=9_999)
    with pytest.raises(ModelError, match="describes 9,999 blocks"):
        load(copy, device="cpu")


@pytest.mark.parametrize("text", ['{"a":' * 100_000, "[1]", "", "{", '{"hidden_size": ' + "9" * 5_000 + "}"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_a_damaged_file_is_an_error_with_its_name(copy, file, text):
    (copy / file).write_text(text)
    with pytest.raises(ModelError, match=str(copy)):
        load(copy, device="cpu")


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"rest", b"\x10\0\0\0\0\0\0\0{}"])
def test_damaged_weights_are_an_error(copy, content):
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(copy, device="cpu")


@pytest.mark.parametrize(("dtype", "name"), [(torch.int8, "I8"), (torch.bool, "BOOL"), (torch.complex64, "C64")])
def test_weights_that_are_no_real_numbers_are_refused_by_name(copy, dtype, name):
    change_weights(copy, lambda state: {k: v.to(dtype) if "up_proj" in k else v for k, v in state.items()})
    with pytest.raises(ModelError, match=rf"layers\.0\.mlp\.up_proj\.weight is {name}"):
        load(copy, device="cpu")


INDEXES = {
    "cut off": ("{", "is damaged: it has no weight_map"),
    "without a map": ('{"metadata": {}}', "is damaged: it has no weight_map"),
    "a list": ('{"weight_map": [1, 2]}', "is damaged: it has no weight_map"),
    "outside": ('{"weight_map": {"x": "../other.safetensors"}}', "which is not in its directory"),
    "a pickle": ('{"weight_map": {"x": "pytorch_model.bin"}}', "Only safetensors are read"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_damaged_index_is_named(copy, kind):
    text, message = INDEXES[kind]
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=message):
        load(copy, device="cpu")


def test_what_is_there_and_no_directory_is_not_sent_to_the_hub(copy, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path, message in ((copy / "config.json", "is a file"), (tmp_path / "loop", "a link that leads nowhere")):
        with pytest.raises(ModelError, match=message):
            load(path, device="cpu")


HOW_TO_RUN = {
    "a hub kernel": {"_attn_implementation": "someone/kernel"},
    "a package that is not there": {"attn_implementation": "flash_attention_2"},
    "no dictionaries": {"return_dict": False},
    "no dictionaries, by a former name": {"use_return_dict": False},
    "attention weights": {"output_attentions": True},
    "hidden states": {"output_hidden_states": True},
    "a type by torch's name": {"dtype": "torch.float32"},
    "a type that says nothing": {"dtype": "auto"},
    "a former name of the type": {"torch_dtype": "float32"},
}


@pytest.mark.parametrize("kind", HOW_TO_RUN)
def test_entries_that_say_how_to_run_a_model_do_not_change_what_it_computes(checkpoint, copy, kind):
    edit(copy, **HOW_TO_RUN[kind])
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected, found = (load(path, device="cpu")[0](ids).logits for path in (checkpoint, copy))
    assert torch.equal(found, expected)


def test_a_hub_kernel_is_never_asked_for(copy, monkeypatch):
    import transformers.integrations.hub_kernels as kernels

    asked = []

    def ask(*names, **_):
        asked.append(names)
        raise OSError("code was asked for")

    monkeypatch.setattr(kernels, "is_kernels_available", lambda *_, **__: True)
    monkeypatch.setattr(kernels, "get_kernel", ask, raising=False)
    edit(copy, _attn_implementation="someone/kernel")
    load(copy, device="cpu")
    skeleton_of(str(copy), PruneConfig())
    assert not asked


def test_float64_is_loaded_as_float32_and_the_log_says_so(copy, caplog):
    change_weights(copy, lambda state: {key: value.double() for key, value in state.items()})
    edit(copy, dtype="float64")
    with caplog.at_level(logging.INFO, "llm_surgeon"):
        assert load(copy, device="cpu")[0].dtype == torch.float32
    assert "float64, and loaded as float32" in caplog.text


def test_without_a_type_the_files_decide(copy):
    change_weights(copy, lambda state: {key: value.bfloat16() for key, value in state.items()})
    settings = json.loads((copy / "config.json").read_text())
    settings.pop("dtype")
    (copy / "config.json").write_text(json.dumps(settings))
    assert load(copy, device="cpu")[0].dtype == torch.bfloat16
    skeleton = skeleton_of(str(copy), PruneConfig())
    assert (skeleton.stored, skeleton.dtype) == (torch.bfloat16, torch.bfloat16)


def test_float8_is_read_as_the_type_that_is_asked_for(copy):
    change_weights(copy, lambda state: {key: value.to(torch.float8_e4m3fn) for key, value in state.items()})
    edit(copy, dtype="float8_e4m3fn")
    stored = load_file(copy / "model.safetensors")["model.norm.weight"]
    model, _ = load(copy, dtype="float32", device="cpu")
    assert torch.equal(model.model.norm.weight, stored.float())


def test_a_byte_order_mark_is_read_away(copy):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text, encoding="utf-8-sig")
    assert load(copy, device="cpu")[0].config.hidden_size == json.loads(text)["hidden_size"]


@pytest.mark.parametrize("method", ["mxfp4", "fp8"])
def test_weights_that_makers_publish_quantised_are_refused_with_the_way_to_16_bits(copy, method):
    edit(copy, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=rf"quantised \({method}\)") as caught:
        skeleton_of(str(copy), PruneConfig())
    assert f"llm-surgeon dequantize {copy} --out DIR" in caught.value.remedy


def test_quantised_weights_are_refused_before_they_are_loaded(copy):
    edit(copy, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UnsupportedModelError, match="quantised"):
        skeleton_of(str(copy), PruneConfig())
