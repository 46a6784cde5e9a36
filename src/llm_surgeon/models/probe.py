"""A probe: tokens that are always the same, and a model's logits of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.models.modes import frozen

PROBE_TOKENS = 64


def probe_tokens(model: PreTrainedModel) -> Tensor:
    """Tokens of the probe, drawn with a fixed seed, ``[1, PROBE_TOKENS]`` or as many as the model has positions."""
    settings = model.config.get_text_config()
    length = min(PROBE_TOKENS, getattr(settings, "max_position_embeddings", None) or PROBE_TOKENS)
    return torch.randint(settings.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> Tensor:
    """Logits of the probe, ``[1, n, vocabulary]`` float32 on the CPU, computed in the type of the weights."""
    with frozen(model):
        ids = probe_tokens(model).to(next(model.parameters()).device)
        logits: Tensor = model(ids, return_dict=True).logits
        return logits.float().cpu()
