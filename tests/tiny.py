"""Tiny random models of the real classes, one per family, and what tests do with them."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 64


def llama(**changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def opt(**changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "word_embed_proj_dim": 24,
        "ffn_dim": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "init_std": 0.2,
        "dropout": 0.0,
    }
    model = OPTForCausalLM(OPTConfig(**{**settings, **changes}))
    # Fresh OPT biases are zero, which would hide every mistake with them.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


BUILDERS = {
    "llama": llama,
    "llama-biased": lambda: _with_biases(llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    "opt": opt,
    "opt-post-norm": lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=16),
}


def _with_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def build(family):
    torch.manual_seed(0)
    return BUILDERS[family]().eval()


def tokens(samples=8, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, length), generator=generator)


def tokenizer():
    """One token per word ``w0`` .. ``w63``."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", pad_token="w0")
