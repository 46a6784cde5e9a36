"""Checkpoints of models whose language model is one tower, as they are stored: in several types, with a processor."""

import json

import torch
from safetensors.torch import load_file, save_file

from tiny import build, tokenizer

# Files of a processor; what is in them does not matter here.
PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Tensors of the image towers that the checkpoints have in another type.
FLOAT32 = ("layer_norm1.bias", "ln_pre.weight", "norm1.bias", "vision_tower.encoder.layers.0.input_layernorm.weight")


def stored(family, directory, former_names=False):
    """A checkpoint in bfloat16, in which some tensors of the image tower are float32."""
    build(family).to(torch.bfloat16).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    for name in PROCESSOR:
        (directory / name).write_text(json.dumps({"name": name}))
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(FLOAT32)]:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)
    if former_names:
        tensors = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in tensors.items()}
    save_file(tensors, path, metadata={"format": "pt"})
    return directory


def beside(name):
    """Whether a tensor is of another tower than the language model."""
    return "language_model" not in name and not name.startswith("lm_head")


def end_of(name):
    """Name of a tensor without what checkpoints and classes put in front of the towers' names in different ways."""
    return name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")


def assert_the_other_towers_are_the_same(source, export):
    before, after = (
        {end_of(name): tensor for name, tensor in load_file(directory / "model.safetensors").items() if beside(name)}
        for directory in (source, export)
    )
    assert before.keys() == after.keys()
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16, torch.float32}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor), name
