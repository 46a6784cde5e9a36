"""Tiny models as they come to be written to GGUF: dense, narrowed, or with whole parts gone."""

import torch

from llm_surgeon import PruneConfig
from llm_surgeon.export.format import Exported
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import cut_out
from llm_surgeon.models.parts.attention import AttentionPart
from llm_surgeon.pruning.shapes import Shapes
from tiny import build, byte_tokenizer, llama_like

HEADS = {"structure": "heads"}
NEURONS = {"structure": "neurons", "round_to": 1}
BOTH = {"structure": "neurons+heads", "round_to": 1}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 32},
}


def anatomy_of(model):
    return examine(model, family_of(model.config.model_type))


def dense(model):
    """A model that has lost nothing."""
    if isinstance(model, str):
        model = build(model)
    anatomy = anatomy_of(model)
    return Exported(model, byte_tokenizer(), anatomy.family, anatomy, None)


def narrowed(model, structure, **options):
    """A model without random heads or neurons."""
    if isinstance(model, str):
        model = build(model)
    anatomy = anatomy_of(model)
    config = PruneConfig.from_mapping({"preset": "none", "sparsity": 0.3, "structure": structure, **options})
    keep = Shapes(config, anatomy).random_masks(0.3, seed=1)
    cut_out(model, anatomy, keep)
    return Exported(model, byte_tokenizer(), anatomy.family, anatomy, keep)


def emptied(model, *gone):
    """A model without parts such as ``attention 0`` or ``feed-forward 1``."""
    if isinstance(model, str):
        model = build(model)
    anatomy = anatomy_of(model)
    keep = anatomy.dense_masks()
    for part in anatomy.parts:
        is_attention = isinstance(part, AttentionPart)
        if f"{'attention' if is_attention else 'feed-forward'} {part.block}" not in gone:
            continue
        for name in {part.prefix + reader for reader in part.entry.readers}:
            keep[name].rows[:] = False
        keep[part.prefix + part.entry.output].columns[:] = False
    cut_out(model, anatomy, keep)
    return Exported(model, byte_tokenizer(), anatomy.family, anatomy, keep)


def seeded(make, **settings):
    """A model that is always the same."""
    torch.manual_seed(0)
    return make(**settings).eval()


def small_llama(config, model, rope, **settings):
    sizes = {"hidden_size": 32, "head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    given = {"rope_theta": 10000.0, **rope}
    return seeded(llama_like, config=config, model=model, **{**sizes, "rope_parameters": given, **settings})
