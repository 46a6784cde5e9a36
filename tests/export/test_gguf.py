"""GGUF files in llama.cpp itself: every architecture, widths of all kinds, and what is refused."""

import importlib.util
import resource

import gguf
import numpy
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gguf_models import BOTH, HEADS, NEURONS, ROPES, dense, emptied, narrowed, seeded, small_llama
from llm_surgeon.errors import ConfigError, DiskSpaceError, ExportMismatchError
from llm_surgeon.export.format import Exported
from llm_surgeon.export.formats import FORMATS
from llm_surgeon.export.gguf import verify as checking
from llm_surgeon.export.gguf.parts import Reader
from llm_surgeon.export.gguf.tokenizer import tokenizer_keys
from llm_surgeon.export.save import save_model
from tiny import WINDOW, byte_tokenizer, llama_like

engine = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp (xllamacpp) is missing")
GGUF = FORMATS["gguf"]
DENSE = {
    **{"llama": "llama", "llama-biased": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"gemma2": "gemma2", "gemma3": "gemma3", "phi3": "phi3", "gpt2": "gpt2"},
    **{"gpt-neox": "gptneox", "gpt-neox-serial": "gptneox"},
}
# The engine computes GELU from a table of float16.
ROUNDED = {"gemma2", "gemma3", "gpt2", "gptneox"}


def keys_of(path):
    """The keys of a file, read back."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def written(exported, directory, form=GGUF):
    """The file of a model, which the engine has checked."""
    form.write(exported, directory)
    (path,) = directory.glob("*.gguf")
    check = form.verify(exported, directory, True)
    name = keys_of(path)["general.architecture"]
    assert 0 <= check.difference < (1e-3 if name in ROUNDED else 1e-5) * check.scale
    assert check.engine.startswith("llama.cpp (xllamacpp ")
    return path, name


def widths(path, name):
    """Heads, key/value heads and neurons of the blocks in a file."""
    keys = keys_of(path)
    suffixes = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    found = [keys[f"{name}.{suffix}"] for suffix in suffixes]
    return [tuple(block) for block in zip(*found, strict=True)] if isinstance(found[0], list) else tuple(found)


def phi3(**rope):
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    lengths = {"max_position_embeddings": 8192, "original_max_position_embeddings": 4096}
    return small_llama(Phi3Config, Phi3ForCausalLM, {"rope_type": "longrope", **rope}, **ids, **lengths)


@engine
@pytest.mark.parametrize("family", DENSE)
def test_every_dense_model_is_in_its_own_architecture(family, tmp_path):
    exported = dense(family)
    path, name = written(exported, tmp_path)
    assert name == DENSE[family]
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    embedding = exported.model.get_input_embeddings().weight.detach().numpy()
    assert numpy.array_equal(tensors["token_embd.weight"], embedding)
    head = exported.model.get_output_embeddings().weight.detach().numpy()
    assert numpy.array_equal(tensors.get("output.weight", embedding), head)


@engine
@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("llama", "llama", HEADS),
        ("qwen2", "qwen2", NEURONS),
        ("qwen3", "qwen3", HEADS),
        ("gemma2", "gemma2", HEADS),
        ("gemma3", "gemma3", NEURONS),
        ("phi3", "phi3", NEURONS),
        ("gpt2", "gpt2", NEURONS),
        ("gpt-neox", "gptneox", NEURONS),
        # The engine's own architecture has as many heads as fill the stream.
        ("qwen2", "deci", HEADS),
    ],
)
def test_equal_widths_stay_in_the_own_architecture_where_it_has_them(family, name, options, tmp_path):
    exported = narrowed(family, **options, uniform=True)
    path, found = written(exported, tmp_path)
    assert found == name
    heads, _, neurons = widths(path, name)[0] if name == "deci" else widths(path, name)
    assert heads < 4 if options is HEADS else neurons < 40


@engine
@pytest.mark.parametrize(
    ("family", "name"),
    [*((family, "deci") for family in ("llama", "llama-biased", "mistral", "qwen2", "phi3")), ("qwen3", "openelm")],
)
def test_blocks_may_differ(family, name, tmp_path):
    exported = narrowed(family, **BOTH)
    path, found = written(exported, tmp_path)
    assert found == name
    first, second = widths(path, name)
    assert first != second


def test_an_untied_head_is_a_tensor_of_its_own(tmp_path):
    GGUF.write(narrowed("llama-biased", **BOTH), tmp_path)
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model-F32.gguf").tensors}
    assert {"output.weight", "blk.1.attn_output.bias", "blk.0.ffn_gate.bias"} <= names


@engine
@pytest.mark.parametrize(
    ("family", "gone", "left"),
    [
        # Without a head the engine takes no first block.
        ("llama", ["attention 0"], [(1, 1, 40), (4, 2, 40)]),
        ("llama", ["attention 1"], [(4, 2, 40), (0, 0, 40)]),
        # Without neurons the engine would forget the attention.
        ("llama", ["feed-forward 1"], [(4, 2, 40), (4, 2, 32)]),
        ("phi3", ["attention 0", "feed-forward 1"], [(1, 1, 40), (4, 2, 32)]),
        # The bias of an emptied attention needs a head, that of an emptied block both.
        ("llama-biased", ["attention 1"], [(4, 2, 40), (1, 1, 40)]),
        ("llama-biased", ["attention 1", "feed-forward 1"], [(4, 2, 40), (1, 1, 32)]),
        ("qwen3", ["attention 1", "feed-forward 0"], [(4, 2, 32), (1, 1, 40)]),
    ],
)
def test_parts_that_are_gone_are_zeros_where_the_engine_needs_them(family, gone, left, tmp_path):
    path, name = written(emptied(family, *gone), tmp_path)
    assert widths(path, name) == left


@engine
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_block_without_anything_is_left_out(family, tmp_path):
    path, name = written(emptied(family, "attention 1", "feed-forward 1"), tmp_path)
    assert name == family
    assert keys_of(path)[f"{name}.block_count"] == 1


@engine
@pytest.mark.parametrize(
    ("config", "model", "kind", "more", "names"),
    [
        (LlamaConfig, LlamaForCausalLM, "llama3", {}, ("llama", "deci")),
        (Qwen2Config, Qwen2ForCausalLM, "yarn", {"attention_factor": 1.3}, ("qwen2", "deci")),
        (LlamaConfig, LlamaForCausalLM, "yarn", {"mscale": 0.7, "mscale_all_dim": 0.5}, ("llama", "deci")),
        (Qwen3Config, Qwen3ForCausalLM, "linear", {}, ("qwen3", "openelm")),
    ],
)
def test_scaled_rotary_embeddings(config, model, kind, more, names, tmp_path):
    rope = ROPES[kind] | more
    for number, name in enumerate(names):
        directory = tmp_path / name
        directory.mkdir()
        made = small_llama(config, model, rope)
        exported = narrowed(made, **NEURONS) if number else dense(made)
        assert written(exported, directory)[1] == name


@engine
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_long_rotary_embeddings_of_a_share_of_each_head(share, tmp_path):
    factors = [1 + 0.3 * pair for pair in range(round(8 * share))]
    rope = {"short_factor": factors, "long_factor": [4 * factor for factor in factors], "partial_rotary_factor": share}
    for exported, name in ((dense(phi3(**rope)), "phi3"), (narrowed(phi3(**rope), **NEURONS), "deci")):
        directory = tmp_path / name
        directory.mkdir()
        assert written(exported, directory)[1] == name


@engine
def test_windows_come_as_they_come(tmp_path):
    kinds = {"s": "sliding_attention", "f": "full_attention"}
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    for order, pattern in (("ssfss", 3), ("fssf", [False, True, True, False])):
        directory = tmp_path / order
        directory.mkdir()
        model = seeded(
            llama_like,
            config=Gemma3TextConfig,
            model=Gemma3ForCausalLM,
            **{"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "rope_parameters": rope},
            **{"layer_types": [kinds[kind] for kind in order], "num_hidden_layers": len(order)},
        )
        path, _ = written(dense(model), directory)
        assert keys_of(path)["gemma3.attention.sliding_window_pattern"] == pattern


@engine
def test_an_architecture_without_windows_is_for_texts_as_long_as_the_window(tmp_path):
    path, _ = written(dense("mistral"), tmp_path)
    assert keys_of(path)["llama.context_length"] == WINDOW


@engine
def test_a_model_from_an_export_becomes_the_same_file(tmp_path):
    ours = narrowed("llama-biased", **BOTH)
    places = [tmp_path / name for name in ("hf", "memory", "export")]
    for place in places:
        place.mkdir()
    save_model(ours.model, None, ours.anatomy, ours.keep, places[0])
    loaded = AutoModelForCausalLM.from_pretrained(places[0], trust_remote_code=True)
    GGUF.write(ours, places[1])
    theirs = Exported(loaded, byte_tokenizer(), ours.family, None, None)
    GGUF.write(theirs, places[2])
    assert GGUF.verify(theirs, places[2], True).difference < 1e-4
    memory, export = ((place / "model-F32.gguf").read_bytes() for place in places[1:])
    assert memory == export


@engine
@pytest.mark.parametrize(
    ("name", "matrices", "tolerance"),
    [("f32", "F32", 1e-5), ("f16", "F16", 5e-3), ("bf16", "BF16", 3e-2), ("q8_0", "Q8_0", 0.12)],
)
def test_types_of_the_weights(name, matrices, tolerance, tmp_path):
    form = FORMATS[f"gguf-{name}"]
    model = seeded(llama_like, config=LlamaConfig, model=LlamaForCausalLM, hidden_size=64, intermediate_size=40)
    # As loading does it: the frequencies of rotary embeddings stay float32.
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    exported = dense(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    form.write(exported, tmp_path)
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / form_file(name)).tensors}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == matrices
    assert types["blk.0.attn_norm.weight"] == "F32"
    # 40 columns are no whole number of blocks.
    assert types["blk.0.ffn_down.weight"] == ("F16" if name == "q8_0" else matrices)
    check = form.verify(exported, tmp_path, True)
    assert check.difference < tolerance * check.scale
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def form_file(name):
    return f"model-{name.upper()}.gguf"


@engine
@pytest.mark.parametrize("name", ["gguf", "gguf-q8_0"])
@pytest.mark.parametrize("kind", ["attn_q", "attn_v", "ffn_up"])
def test_a_wrong_layer_is_found_in_every_type(name, kind, tmp_path, monkeypatch):
    part = "attention" if kind.startswith("attn") else "feed_forward"
    right = getattr(Reader, part)

    def wrong(self, asked):
        weight, bias = right(self, asked)
        # The rows are there, and in another order.
        return weight.roll(1, 0) if asked == kind and self._block.number == 1 else weight, bias

    exported = narrowed("llama", **BOTH)
    with monkeypatch.context() as patch:
        patch.setattr(Reader, part, wrong)
        FORMATS[name].write(exported, tmp_path)
    with pytest.raises(ExportMismatchError, match="computes something else from model"):
        FORMATS[name].verify(exported, tmp_path, True)


def test_without_the_engine_nothing_is_checked(tmp_path, monkeypatch):
    exported = dense("llama")
    GGUF.write(exported, tmp_path)
    monkeypatch.setattr(checking, "ENGINE", "no_such_engine")
    assert GGUF.verify(exported, tmp_path, True) is None


def test_a_weight_beyond_float16_is_refused(tmp_path):
    exported = dense("llama")
    exported.model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    with pytest.raises(ConfigError, match=r"ffn_up.* float16 ends at 65504.*gguf-bf16"):
        FORMATS["gguf-f16"].write(exported, tmp_path)


def test_a_full_disk_is_named(tmp_path):
    exported = dense(seeded(llama_like, config=LlamaConfig, model=LlamaForCausalLM, hidden_size=256))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(DiskSpaceError, match="disk is full"):
            GGUF.write(exported, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_the_licence_goes_with_the_weights(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "LICENSE.txt").write_text("of the weights")
    (source / "tokenizer.json").write_text("{}")
    ours = dense("llama")
    GGUF.write(Exported(ours.model, ours.tokenizer, ours.family, ours.anatomy, None, source), out)
    assert sorted(path.name for path in out.iterdir()) == ["LICENSE.txt", "model-F32.gguf"]


def test_the_tokenizer_is_that_of_the_model(tmp_path):
    exported = dense("llama")
    GGUF.write(exported, tmp_path)
    keys = tokenizer_keys(exported.tokenizer, exported.model.config.vocab_size)
    assert keys_of(tmp_path / "model-F32.gguf")["tokenizer.ggml.tokens"] == list(keys.tokens)
