"""What the GGUF formats refuse, before the work and from the model itself, and what the plan says of them."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gguf_models import BOTH, HEADS, NEURONS, ROPES, dense, emptied, narrowed, seeded, small_llama
from llm_surgeon import PruneConfig
from llm_surgeon.errors import ConfigError, UnsupportedModelError
from llm_surgeon.export.formats import FORMATS
from tiny import WINDOW, build, llama_like, tokenizer

GGUF = FORMATS["gguf"]


def turned(rope):
    return small_llama(LlamaConfig, LlamaForCausalLM, rope)


def untied_qwen3():
    return seeded(llama_like, config=Qwen3Config, model=Qwen3ForCausalLM, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dense("opt"), "no architecture for opt"),
        (lambda: narrowed("gpt2", **NEURONS), r"gpt2 has one width for all blocks.*neurons with --uniform"),
        (lambda: narrowed("gemma2", **BOTH), r"gemma2 has one width .*neurons\+heads with --uniform"),
        (lambda: emptied("gpt-neox", "attention 0"), "gptneox has one width for all blocks"),
        (lambda: narrowed("gpt2", **HEADS), "gpt2 has one width for all blocks"),
        (
            lambda: narrowed(untied_qwen3(), **BOTH),
            "openelm takes its embedding for the output head.*--uniform",
        ),
        (lambda: dense(turned({"rope_type": "dynamic", "factor": 2.0})), "of the kind dynamic"),
        (lambda: dense(turned(ROPES["yarn"] | {"beta_slow": 2.0})), "yarn with beta_slow = 2.0"),
        (
            lambda: dense(small_llama(Qwen3Config, Qwen3ForCausalLM, ROPES["llama3"])),
            "qwen3 reads no divisors of frequencies.* llama3",
        ),
        (
            lambda: dense(seeded(llama_like, config=LlamaConfig, model=LlamaForCausalLM, hidden_act="relu")),
            "computes other activations than relu",
        ),
        (lambda: emptied("gemma2", "attention 0", "feed-forward 0"), "gemma2 cannot have layer_types"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused_before_anything_is_written(make, words, tmp_path):
    exported = make()
    with pytest.raises(ConfigError, match=words) as refused:
        GGUF.write(exported, tmp_path)
    assert "--" in refused.value.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"structure": "rows-columns"}, r"rows-columns leaves matrices with gaps.*neurons\+heads"),
        ("llama", {"structure": "heads+values"}, "values leaves matrices with gaps"),
        ("opt", NEURONS, "no architecture for opt"),
        ("gemma3", BOTH, "gemma3 has one width .*--uniform"),
        ("gpt2", {**HEADS, "uniform": True}, "gpt2 needs heads that together are as wide"),
        ("gemma2", {"structure": "blocks"}, "gemma2 has one width"),
    ],
)
@pytest.mark.parametrize("name", ["gguf", "gguf-q8_0"])
def test_a_recipe_is_refused_before_the_work(name, family, options, words):
    exported = dense(family)
    config = PruneConfig.from_mapping({"preset": "none", "sparsity": 0.3, "formats": [name], **options})
    with pytest.raises(ConfigError, match=words) as refused:
        FORMATS[name].check(config, exported.anatomy, exported.model.config)
    assert "--" in refused.value.remedy


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {"structure": "unstructured"}, "as architecture llama; .*zeros by themselves make it no faster"),
        ("llama", {**BOTH, "uniform": True}, "as architecture llama;"),
        ("llama", BOTH, "as architecture deci; verified with llama.cpp of xllamacpp 2026"),
        ("llama", {"structure": "blocks"}, "as architecture deci;"),
        ("qwen3", BOTH, "as architecture openelm;"),
        ("phi3", {**HEADS, "uniform": True}, "as architecture deci;"),
        ("mistral", BOTH, f"for texts of at most {WINDOW} tokens"),
        ("gpt2", {**NEURONS, "uniform": True}, "its GELU is an approximation"),
    ],
)
def test_the_plan_says_what_loads_it(family, options, words):
    exported = dense(family)
    config = PruneConfig.from_mapping({"preset": "none", "sparsity": 0.3, "formats": ["gguf"], **options})
    GGUF.check(config, exported.anatomy, exported.model.config)
    (line,) = GGUF.loaders(config, exported.model.config)
    assert re.search(words, line)


def test_a_tokenizer_is_refused_before_the_work():
    with pytest.raises(UnsupportedModelError, match="WordLevel"):
        GGUF.check_tokenizer(tokenizer(), build("llama").config)


def test_bytes_of_a_parameter():
    found = {name: form.nbytes(32, torch.bfloat16) for name, form in FORMATS.items() if name.startswith("gguf")}
    assert found == {"gguf": 64, "gguf-f32": 128, "gguf-f16": 64, "gguf-bf16": 64, "gguf-q8_0": 34}
