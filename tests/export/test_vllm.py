"""Exports for vLLM: what its own class is told, rebuilt block by block here, and by vLLM itself where it is installed.

To run vLLM's part, name the Python of an environment with vLLM in the variable LLM_SURGEON_VLLM_PYTHON.
"""

import importlib.util
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from choosing import attentions, feed_forwards, shrink
from llm_surgeon.errors import ConfigError, ExportMismatchError
from llm_surgeon.export.format import Exported
from llm_surgeon.export.formats import check_formats
from llm_surgeon.export.hugging_face import HuggingFace
from llm_surgeon.export.vllm.nemotron_nas import NemotronNas
from llm_surgeon.export.vllm.verify import verify_in_vllm, vllm_python
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.modeling_text import BLOCK_CONFIGS_FILE
from llm_surgeon.pruning.shapes import Shapes
from llm_surgeon.recipe.config import PruneConfig
from tiny import build, llama, llama_like, tokenizer, tokens

IDS = tokens(2, 12, seed=3)
WITH_VLLM = pytest.mark.skipif(vllm_python() is None, reason="vLLM is not installed, nor named by the environment")
FORM = NemotronNas()
# vLLM's attention on a CPU takes heads of 32 dimensions and more.
WIDE = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 64}


def emptied(keep, layers):
    for name in layers:
        keep[name].rows.fill_(False)
        keep[name].columns.fill_(False)


def pruned(kind, family="llama", **changes):
    """A model of a few blocks after a removal, ready to be exported."""
    biased = {"attention_bias": True, "mlp_bias": True} if family == "llama-biased" else {}
    model = build(family) if family == "qwen2" else llama(num_hidden_layers=3, **biased, **changes)
    anatomy = examine(model, family_of(model.config.model_type))
    keep = anatomy.dense_masks()
    feed, attention = feed_forwards(anatomy), attentions(anatomy)
    if kind == "uneven neurons":
        for part, gone in zip(feed, (3, 17, 8), strict=False):
            for rows in part.inputs:
                keep[rows.layer].rows[rows.index[:gone]] = False
            keep[part.output.layer].columns[part.output.index[:gone]] = False
    elif kind == "equal heads":
        for part in attention:
            for rows in (part.query, part.key, part.value):
                keep[rows.layer].rows[rows.index[0]] = False
            keep[part.output.layer].columns[part.output.index[0]] = False
    else:
        missing = {
            "no attention": [attention[1]],
            "no attention at the beginning": [attention[0]],
            "no feed-forward part": [feed[0]],
            "neither": [attention[1], feed[1]],
        }[kind]
        for part in missing:
            emptied(keep, part.layers)
    shrink(model, anatomy, keep)
    return Exported(model, tokenizer(), anatomy.family, anatomy, keep)


class Nothing(nn.Module):
    """A part that is not there."""

    def forward(self, hidden_states, **_):
        return (torch.zeros_like(hidden_states), None) if _ else torch.zeros_like(hidden_states)


def rebuilt(directory, model_class=LlamaForCausalLM, config_class=LlamaConfig):
    """What a class does that builds each block by its entry in block_configs, from the files alone."""
    entries = json.loads((directory / "config.json").read_text())
    settings = config_class(
        **{name: value for name, value in entries.items() if name not in ("block_configs", "model_type")}
    )
    model = model_class(settings).eval()
    for number, block in enumerate(entries["block_configs"]):
        layer = model.model.layers[number]
        if block["attention"]["no_op"]:
            layer.self_attn = Nothing()
        else:
            assert (
                block["attention"]["n_heads_in_group"] == settings.num_attention_heads // settings.num_key_value_heads
            )
        if block["ffn"]["no_op"]:
            layer.mlp = Nothing()
        else:
            own = config_class(**{**settings.to_dict(), "intermediate_size": block["ffn"]["intermediate_size"]})
            layer.mlp = type(layer.mlp)(own)
    state = {}
    for file in directory.glob("*.safetensors"):
        state |= load_file(file)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    blocks = entries["block_configs"]
    for name in missing:
        tied = name == "lm_head.weight" and settings.tie_word_embeddings
        norm = name.endswith("norm.weight") and name.count(".") == 4
        gone = norm and blocks[int(name.split(".")[2])]["attention" if "input" in name else "ffn"]["no_op"]
        assert tied or gone, name
    return model


KINDS = (
    "uneven neurons",
    "equal heads",
    "no attention",
    "no attention at the beginning",
    "no feed-forward part",
    "neither",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "llama-biased"])
def test_blocks_built_from_the_entries_compute_what_the_model_does(family, kind, tmp_path):
    exported = pruned(kind, family)
    with torch.no_grad():
        expected = exported.model(IDS).logits
    assert FORM.write(exported, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt(tmp_path)(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    first = json.loads((tmp_path / "config.json").read_text())["block_configs"][0]
    assert not first["attention"]["no_op"], "vLLM's class cannot begin with a feed-forward part alone"


def test_a_block_that_does_nothing_is_not_written(tmp_path):
    FORM.write(pruned("neither"), tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["num_hidden_layers"] == len(entries["block_configs"]) == 2


def test_biases_of_queries_keys_and_values_alone_are_said(tmp_path):
    exported = pruned("uneven neurons", "qwen2")
    with torch.no_grad():
        expected = exported.model(IDS).logits
    FORM.write(exported, tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert (entries["qkv_bias"], entries["attention_bias"], entries["mlp_bias"]) == (True, False, False)
    with torch.no_grad():
        again = rebuilt(tmp_path, Qwen2ForCausalLM, Qwen2Config)(IDS).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


def test_the_configuration_has_entries_as_attributes_and_is_written_again(tmp_path):
    FORM.write(pruned("uneven neurons"), tmp_path)
    spec = importlib.util.spec_from_file_location("block_configs", tmp_path / BLOCK_CONFIGS_FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.BlockConfigsConfig.from_pretrained(tmp_path)
    assert [block.ffn.intermediate_size for block in config.block_configs] == [37, 23, 32]
    assert not config.block_configs[0].attention.no_op
    assert not hasattr(config.block_configs[0].ffn, "ffn_mult")
    config.save_pretrained(tmp_path / "again")
    again = module.BlockConfigsConfig.from_pretrained(tmp_path / "again")
    assert again.block_configs == config.block_configs


REFUSED = {
    "rows-columns": ({"structure": "rows-columns"}, "llama", "has no matrices without some"),
    "uneven heads": ({"structure": "neurons+heads"}, "llama", "equally many heads"),
    "values": ({"structure": "values"}, "llama", "has no matrices without some"),
    "family": ({"structure": "neurons"}, "opt", "not for opt"),
    "norms of heads": ({"structure": "neurons"}, "qwen3", "not for qwen3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_class_cannot_be_is_refused_before_the_work(case):
    options, family, words = REFUSED[case]
    model = build(family)
    anatomy = examine(model, family_of(model.config.model_type))
    recipe = PruneConfig.from_mapping({"sparsity": 0.3, "formats": ["hf", "nemotron-nas"], **options})
    with pytest.raises(ConfigError, match=words) as refused:
        check_formats(recipe, anatomy, model.config)
    assert "--" in refused.value.remedy


def test_windows_and_other_activations_are_refused():
    recipe = PruneConfig.from_mapping({"sparsity": 0.3, "formats": ["nemotron-nas"], "structure": "neurons"})
    for changes, words in (({"hidden_act": "gelu"}, "activation silu"), ({"sliding_window": 6}, "no sliding windows")):
        model = build("mistral") if "sliding_window" in changes else llama(**changes)
        for name, value in changes.items():
            setattr(model.config, name, value)
        anatomy = examine(model, family_of(model.config.model_type))
        with pytest.raises(ConfigError, match=words):
            check_formats(recipe, anatomy, model.config)


def test_uneven_heads_of_a_finished_model_are_refused_before_anything_is_written(tmp_path):
    exported = pruned("uneven neurons")
    anatomy, keep = exported.anatomy, exported.keep
    part = attentions(anatomy)[0]
    for rows in (part.query, part.key, part.value):
        keep[rows.layer].rows[rows.index[0]] = False
    keep[part.output.layer].columns[part.output.index[0]] = False
    model = llama(num_hidden_layers=3)
    shrink(model, anatomy, keep)
    with pytest.raises(ConfigError, match="2/1, 4/2 query and key/value heads"):
        FORM.write(Exported(model, tokenizer(), anatomy.family, anatomy, keep), tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_vllm_nothing_is_claimed(tmp_path, monkeypatch):
    monkeypatch.delenv("LLM_SURGEON_VLLM_PYTHON", raising=False)
    if importlib.util.find_spec("vllm") is None:
        assert verify_in_vllm(build("llama"), tmp_path) is None


def test_a_python_without_vllm_is_an_error_with_a_remedy(tmp_path, monkeypatch):
    if importlib.util.find_spec("vllm") is not None:
        pytest.skip("this Python has vLLM")
    monkeypatch.setenv("LLM_SURGEON_VLLM_PYTHON", sys.executable)
    with pytest.raises(ExportMismatchError, match="No module named 'vllm'") as found:
        verify_in_vllm(build("llama"), tmp_path)
    assert "LLM_SURGEON_VLLM_PYTHON" in found.value.remedy


@WITH_VLLM
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_computes_the_same_with_its_own_class(kind, tmp_path):
    exported = pruned(kind, **WIDE)
    FORM.write(exported, tmp_path)
    check = FORM.verify(exported, tmp_path, True)
    assert check.engine.startswith("vLLM")
    assert check.difference < 5e-3


@WITH_VLLM
@pytest.mark.slow
@pytest.mark.parametrize("structure", ["neurons", "neurons+heads"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_vllm_computes_the_same_with_its_backend_for_transformers(family, structure, tmp_path):
    config, model_class = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[family]
    model = llama_like(config, model_class, **WIDE).eval()
    anatomy = examine(model, family_of(model.config.model_type))
    recipe = PruneConfig.from_mapping({"structure": structure, "sparsity": 0.1})
    keep = Shapes(recipe, anatomy).random_masks(0.1, seed=2)
    shrink(model, anatomy, keep)
    exported = Exported(model, tokenizer(), anatomy.family, anatomy, keep)
    HuggingFace().write(exported, tmp_path)
    check = verify_in_vllm(model, tmp_path, "transformers")
    assert check.difference < 5e-3


@WITH_VLLM
@pytest.mark.slow
@pytest.mark.parametrize("structure", ["values", "rows-columns"])
def test_vllm_refuses_layers_that_skip_channels(structure, tmp_path):
    """It would not load their indices, and compute something else without a word."""
    model = llama(**WIDE)
    anatomy = examine(model, family_of(model.config.model_type))
    recipe = PruneConfig.from_mapping({"structure": structure, "sparsity": 0.1})
    keep = Shapes(recipe, anatomy).random_masks(0.1, seed=2)
    shrink(model, anatomy, keep)
    HuggingFace().write(Exported(model, tokenizer(), anatomy.family, anatomy, keep), tmp_path)
    with pytest.raises(ExportMismatchError, match="vLLM cannot load the export"):
        verify_in_vllm(model, tmp_path, "transformers")
