"""Checkpoints in FP8 and MXFP4 that are written in 16 bits, and pruned then."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from llm_surgeon import PruneConfig, dequantize, prune_checkpoint
from llm_surgeon.cli import app
from llm_surgeon.errors import ConfigError, DiskSpaceError, ModelError, OutputError, UnsupportedModelError
from llm_surgeon.mathematics.block_formats import fp8_numbers, mxfp4_numbers
from llm_surgeon.models.loading import load_model
from llm_surgeon.models.skeleton import skeleton_of
from llm_surgeon.run import dequantising
from quick import without_what_has_other_tests
from tiny import build, gpt_oss, tokenizer, tokens

# Not a divisor of all sides, as the last tile of a matrix may be smaller.
BLOCK = (16, 16)
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}


def made(family):
    # Blocks of 32 numbers divide its sides.
    return gpt_oss(hidden_size=32, intermediate_size=64).eval() if family == "gpt-oss" else build(family)


def saved(family, directory):
    made(family).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def quantised(directory, tensors, how, text_config=False):
    settings = json.loads((directory / "config.json").read_text(encoding="utf8"))
    (settings["text_config"] if text_config else settings)["quantization_config"] = how
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf8")
    # Scales may be in another file than their matrices.
    (directory / "model.safetensors").unlink()
    for number, part in enumerate((0, 1)):
        some = {name: tensor for place, (name, tensor) in enumerate(tensors.items()) if place % 2 == part}
        save_file(some, directory / f"model-{number}.safetensors", metadata={"format": "pt"})


def in_fp8(family, directory, *, text_config=False):
    """Write a tiny checkpoint with its linear layers in FP8; returns the numbers that they mean."""
    generator = torch.Generator().manual_seed(1)
    stored, meant = {}, {}
    for name, tensor in saved(family, directory).items():
        stored[name] = meant[name] = tensor
        if name.endswith(("_proj.weight", "mqa.weight", "experts.gate_up_proj", "experts.down_proj")):
            tiles = [-(-size // side) for size, side in zip(tensor.shape[-2:], BLOCK, strict=True)]
            scales = 0.01 + torch.rand(*tensor.shape[:-2], *tiles, generator=generator) / 1000
            stored[name] = (tensor / 0.01).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
            stored[f"{name.removesuffix('.weight')}.activation_scale"] = torch.ones(())
            meant[name] = fp8_numbers(stored[name], scales, BLOCK)
    assert len(stored) > len(meant)
    quantised(directory, stored, FP8, text_config)
    return meant


def in_mxfp4(directory):
    """Write a tiny gpt-oss with its experts in MXFP4; returns the numbers that they mean."""
    generator = torch.Generator().manual_seed(1)
    stored, meant = {}, {}
    for name, tensor in saved("gpt-oss", directory).items():
        stored[name] = meant[name] = tensor
        if name.endswith(("gate_up_proj", "down_proj")):
            del stored[name]
            experts, inputs, outputs = tensor.shape
            shape = experts, outputs, inputs // 32
            blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(120, 124, shape, generator=generator, dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = mxfp4_numbers(blocks, scales).transpose(1, 2)
    assert len(stored) > len(meant)
    quantised(directory, stored, {"quant_method": "mxfp4"})
    return meant


@pytest.mark.parametrize(
    ("family", "method"),
    [(name, "fp8") for name in ("llama", "qwen3-moe", "deepseek-v3", "gpt-oss", "mistral3-tower")]
    + [("gpt-oss", "mxfp4")],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_result_is_the_model_that_was_meant(family, method, dtype, tmp_path):
    source, out = tmp_path / "quantised", tmp_path / "in-16-bits"
    tower = family.endswith("tower")
    meant = in_mxfp4(source) if method == "mxfp4" else in_fp8(family, source, text_config=tower)

    assert dequantize(source, out, dtype=dtype) == out

    stored = {name: x for path in out.glob("*.safetensors") for name, x in load_file(path).items()}
    assert stored.keys() == meant.keys()
    rounded = [name for name, tensor in stored.items() if tensor.dtype == torch.bfloat16]
    assert bool(rounded) == (dtype == "bfloat16")
    assert all(torch.equal(stored[name], meant[name].to(stored[name].dtype)) for name in meant)
    if method == "mxfp4":
        assert all(torch.equal(stored[name].float(), meant[name]) for name in rounded), "MXFP4 is exact in 16 bits"
    found, expected = (
        load_model(str(place), "float32") for place in (out, written(family, stored, tmp_path / "meant"))
    )
    with torch.no_grad():
        logits = [model(tokens(2, 8)).logits for model in (found, expected)]
    assert torch.equal(*logits)
    assert "quantization_config" not in (out / "config.json").read_text(encoding="utf8")


def written(family, tensors, directory):
    """A checkpoint of plain tensors."""
    made(family).save_pretrained(directory)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_it_is_pruned_then(tmp_path, text_file, monkeypatch):
    without_what_has_other_tests(monkeypatch)
    in_mxfp4(tmp_path / "quantised")
    options = {"samples": 8, "seq_len": 16, "evaluation": "none", "structure": "experts", "sparsity": 0.25}
    recipe = PruneConfig.from_mapping({**options, "preset": "none", "shots": 1, "calibration": str(text_file)})
    with pytest.raises(UnsupportedModelError) as caught:
        prune_checkpoint(tmp_path / "quantised", tmp_path / "out", recipe)
    assert f"llm-surgeon dequantize {tmp_path / 'quantised'} --out DIR" in caught.value.remedy

    dequantize(tmp_path / "quantised", tmp_path / "in-16-bits")
    report = prune_checkpoint(tmp_path / "in-16-bits", tmp_path / "out", recipe)

    assert report.shots[-1].size.total < report.dense_size.total
    assert skeleton_of(str(tmp_path / "in-16-bits"), recipe).dtype == torch.bfloat16


def test_files_are_of_limited_size(tmp_path, monkeypatch):
    in_fp8("llama", tmp_path / "quantised")
    monkeypatch.setattr(dequantising, "_FILE", 10_000)
    dequantize(tmp_path / "quantised", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text(encoding="utf8"))
    files = sorted({*index["weight_map"].values()})
    assert len(files) > 2
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    load_model(str(tmp_path / "out"))


def test_what_cannot_be_read_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    source, out = tmp_path / "quantised", tmp_path / "out"
    meant = in_fp8("llama", source)
    path = source / "config.json"
    settings = json.loads(path.read_text(encoding="utf8"))

    def refused(error, match, **options):
        with pytest.raises(error, match=match):
            dequantize(source, out, **options)
        assert {entry.name for entry in tmp_path.iterdir()} == {"quantised"}

    refused(ConfigError, "no type of its own", dtype="auto")
    refused(ConfigError, "not known", dtype="int8")
    for how, match in ((None, "not quantised"), ({"quant_method": "gptq"}, "by 'gptq'; fp8 and mxfp4 are read")):
        path.write_text(json.dumps(settings | {"quantization_config": how}), encoding="utf8")
        refused(ModelError, match)
    path.write_text(
        json.dumps(settings | {"quantization_config": FP8 | {"weight_block_size": [7, 7]}}), encoding="utf8"
    )
    refused(ModelError, "is not what its configuration says: . scales do not divide")
    path.write_text(json.dumps(settings), encoding="utf8")
    monkeypatch.setattr(dequantising, "check_disk_space", full)
    refused(DiskSpaceError, "full")
    monkeypatch.undo()
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({k: v for k, v in tensors.items() if "scale" not in k}, file, metadata={"format": "pt"})
    refused(ModelError, "there is no model.layers.*_scale_inv")
    for file in source.glob("*.safetensors"):
        file.unlink()
    save_file({k: v.clone() for k, v in meant.items() if "mlp" not in k}, source / "model.safetensors")
    refused(ModelError, f"weights of '{source}' are not .* it lacks model.layers.0.mlp")
    (source / "model.safetensors").unlink()
    refused(ModelError, "no weights")
    out.write_text("", encoding="utf8")
    with pytest.raises(OutputError, match="is a file"):
        dequantize(source, out)


def test_quantisation_of_the_language_model_alone_is_refused_by_name(tmp_path):
    in_fp8("mistral3-tower", tmp_path, text_config=True)
    with pytest.raises(UnsupportedModelError, match=r"quantised \(fp8\)"):
        skeleton_of(str(tmp_path), PruneConfig())


def full(*_):
    raise DiskSpaceError("full", "free some")


def test_the_command(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    in_fp8("llama", tmp_path / "quantised")
    done = CliRunner().invoke(app, ["dequantize", str(tmp_path / "quantised"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert f"llm-surgeon prune {tmp_path / 'out'} --out DIR" in done.output
    load_model(str(tmp_path / "out"))
