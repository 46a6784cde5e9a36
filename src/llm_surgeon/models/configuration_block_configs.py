"""Configuration of a Llama whose blocks have widths of their own, as vLLM's class DeciLMForCausalLM reads it.

This text travels inside exported checkpoints, so it needs transformers only, and nothing of the package that wrote it.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import LlamaConfig


class Entries(dict):  # type: ignore[type-arg]
    """A dictionary whose entries are attributes too, as vLLM reads them; it is still written as JSON."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __deepcopy__(self, memo: dict[int, Any]) -> Entries:
        return with_attributes({name: copy.deepcopy(value, memo) for name, value in self.items()})


def with_attributes(entries: dict[str, Any]) -> Entries:
    """A dictionary of JSON, with the dictionaries inside it, as entries that are attributes."""
    return Entries(
        {name: with_attributes(value) if isinstance(value, dict) else value for name, value in entries.items()}
    )


class BlockConfigsConfig(LlamaConfig):
    """Llama's configuration with an entry ``block_configs``, one of each block."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.block_configs = [with_attributes(entries) for entries in block_configs or []]
