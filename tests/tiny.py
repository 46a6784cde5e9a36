"""Tiny random models of the real classes, one per family, and what tests do with them."""

from __future__ import annotations

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tiny_towers

VOCABULARY = 64


def llama(**changes):
    return llama_like(LlamaConfig, LlamaForCausalLM, **changes)


def llama_like(config, model, **changes):
    """A model of Llama's layout."""
    return model(config(**{**_LLAMA_LIKE, **changes}))


_LLAMA_LIKE = {
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


# Shorter than the texts of the tests, so that the windows matter.
WINDOW = 6


def gemma2():
    return llama_like(
        Gemma2Config,
        Gemma2ForCausalLM,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        attn_implementation="eager",
    )


def gemma3():
    return llama_like(
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=8,
    )


def _gemma4(**changes):
    # Heads are wider in the second block, where values are keys.
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    wide = {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 10000.0}
    return {
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "global_head_dim": 12,
        "num_global_key_value_heads": 1,
        "rope_parameters": {"sliding_attention": rope, "full_attention": wide},
        **changes,
    }


def gemma4(**changes):
    return _with_factors(of_class("Gemma4", kind="Text", **_gemma4(**changes)))


def gemma4_tower():
    return _with_factors(tower(tiny_towers.gemma4, **_gemma4()))


def _with_factors(model):
    """Factors of the stream behind each block away from 1."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)
    return model


def gpt2(**changes):
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 24,
        "n_inner": 40,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**{**settings, **changes}))


def gpt_neox(**changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "rotary_pct": 0.5,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**settings, **changes}))


def phi3():
    # Half of each head is rotated, as in Phi-4-mini.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return llama_like(Phi3Config, Phi3ForCausalLM, hidden_size=32, rope_parameters=rope, **ids)


def of_class(name, kind="", **changes):
    """A model of Llama's layout of the classes with this name in transformers; the configuration is of a kind."""
    config = getattr(transformers, f"{name}{kind}Config")
    model = getattr(transformers, f"{name}ForCausalLM")
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return _with_norms(_with_biases(llama_like(config, model, **{**ids, **changes})))


def granite():
    factors = {"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}
    return of_class("Granite", logits_scaling=2.0, **factors)


def ministral3():
    # Positions of the tests' texts are beyond the original ones, so that their queries are scaled.
    rope = {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.3}
    return of_class("Ministral3", rope_parameters={**rope, "original_max_position_embeddings": 4})


def qwen3_moe(**changes):
    # One block is dense.
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]}
    return of_class("Qwen3Moe", norm_topk_prob=True, **{**sizes, **changes})


def mixtral(**changes):
    return of_class("Mixtral", **{"num_local_experts": 4, "num_experts_per_tok": 2, **changes})


# A block of each kind. Each key head of the delta net serves two value heads, of another width.
_DELTA_NETS = {
    "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
}
_SHARED = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "shared_expert_intermediate_size": 24,
}


def qwen3_5():
    return of_class("Qwen3_5", kind="Text", **_DELTA_NETS)


def qwen3_5_moe(**changes):
    return of_class("Qwen3_5Moe", kind="Text", **_DELTA_NETS, **{**_SHARED, **changes})


def qwen3_next(**changes):
    # One block is dense.
    return of_class("Qwen3Next", **_DELTA_NETS, **{**_SHARED, "num_experts": 12, "mlp_only_layers": [1], **changes})


def tower(build, *, name=None, **text):
    """A model for text and images whose text tower is of Llama's layout; one builder makes models of several names."""
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    names = {} if name is None else {"name": name}
    return _with_norms(_with_biases(build({**_LLAMA_LIKE, **ids, **text}, **names)))


def qwen3_vl():
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    return tower(tiny_towers.qwen3_vl, rope_parameters=rope)


def qwen3_5_tower(**text):
    settings = {**_DELTA_NETS, "tie_word_embeddings": False, **text}
    rope = {**settings.pop("rope_parameters"), "mrope_section": [1, 1, 0], "mrope_interleaved": True}
    return tower(tiny_towers.qwen3_5, rope_parameters=rope, **settings)


def qwen3_5_moe_tower():
    return qwen3_5_tower(name="Qwen3_5Moe", **_SHARED)


# Language models by themselves.
ALONE = {
    "llama": llama,
    "llama-biased": lambda: _with_biases(llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=False)),
    "mistral": lambda: llama_like(MistralConfig, MistralForCausalLM, sliding_window=WINDOW),
    "qwen2": lambda: _with_biases(llama_like(Qwen2Config, Qwen2ForCausalLM, head_dim=6)),
    "qwen3": lambda: _with_norms(llama_like(Qwen3Config, Qwen3ForCausalLM)),
    "gemma2": lambda: _with_norms(gemma2()),
    "gemma3": lambda: _with_norms(gemma3()),
    "phi3": phi3,
    "gpt2": lambda: _with_biases(gpt2()),
    "gpt-neox": lambda: _with_norms(_with_biases(gpt_neox())),
    "gpt-neox-serial": lambda: _with_biases(gpt_neox(use_parallel_residual=False)),
    "smollm3": lambda: of_class("SmolLM3", no_rope_layers=[1, 0]),
    "seed-oss": lambda: of_class("SeedOss", attention_bias=True),
    "ministral3": ministral3,
    "hunyuan": lambda: of_class("HunYuanDenseV1"),
    "exaone4": lambda: of_class("Exaone4", **_MIXED),
    "starcoder2": lambda: of_class("Starcoder2", hidden_size=32),
    "granite": granite,
    "olmo2": lambda: of_class("Olmo2"),
    "olmo3": lambda: of_class("Olmo3", **_MIXED),
    # Half of each head is rotated.
    "glm4": lambda: of_class("Glm4", rope_parameters={"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
    "ernie4-5": lambda: of_class("Ernie4_5", use_bias=True),
    "cohere2": lambda: of_class("Cohere2", hidden_size=32, logit_scale=0.5, **_MIXED),
    "helium": lambda: of_class("Helium", hidden_size=32),
    "qwen3-5": qwen3_5,
    "opt": opt,
    "opt-post-norm": lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=16),
}

TOWERS = {
    "gemma3-tower": lambda: tower(tiny_towers.gemma3, query_pre_attn_scalar=8, **_MIXED),
    "mistral3-tower": lambda: tower(tiny_towers.mistral3, model_type="mistral", sliding_window=None),
    "mistral3-ministral3-tower": lambda: tower(tiny_towers.mistral3, model_type="ministral3"),
    "qwen3-vl-tower": qwen3_vl,
    "qwen3-5-tower": qwen3_5_tower,
}
BUILDERS = {**ALONE, **TOWERS}


# The first block is dense; tokens go to one of two groups of experts.
_GROUPED = {
    **{"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 2},
    **{"moe_intermediate_size": 16, "first_k_dense_replace": 1, "hidden_size": 32},
}


def glm4_moe(**changes):
    model = of_class("Glm4Moe", **{**_GROUPED, "use_qk_norm": True, "routed_scaling_factor": 1.5, **changes})
    return _with_corrections(model)


def deepseek_v3(**changes):
    ranks = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    heads = {"num_key_value_heads": 4, "head_dim": 4}
    return _with_corrections(of_class("DeepseekV3", **{**_GROUPED, **ranks, **heads, **changes}))


def _with_corrections(model):
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.03)
    return model


# Blocks of both kinds of attention, with windows that matter.
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}


def gpt_oss(**changes):
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = of_class("GptOss", num_local_experts=4, num_experts_per_tok=2, rope_parameters=rope, **_MIXED, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("sinks", "proj_bias")):
                parameter.normal_(std=0.2)
    return model


# Models with experts.
MIXTURES = {
    "qwen3-moe": qwen3_moe,
    "mixtral": mixtral,
    "glm4-moe": glm4_moe,
    "deepseek-v3": deepseek_v3,
    "gpt-oss": gpt_oss,
    "qwen3-next": qwen3_next,
    "qwen3-5-moe": qwen3_5_moe,
}
# Models whose attention stays as it is, without experts.
NEURONS_ALONE = {"gemma4": gemma4, "gemma4-tower": gemma4_tower}
MIXTURE_TOWERS = {"qwen3-5-moe-tower": qwen3_5_moe_tower}


def _with_norms(model):
    """Norms' weights away from where they begin, which is the same for all channels."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _with_biases(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


def build(family):
    torch.manual_seed(0)
    return (BUILDERS | MIXTURES | NEURONS_ALONE | MIXTURE_TOWERS)[family]().eval()


def tokens(samples=8, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, length), generator=generator)


def tokenizer():
    """One token per word ``w0`` .. ``w63``."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="w0", pad_token="w0")


def byte_tokenizer():
    """One token per byte, as many as there is room for, one for two of them, and one that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda byte: (not byte.islower(), byte))[: VOCABULARY - 2]
    tokens = [*letters, "th", "<end>"]
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("t", "h")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
