"""Families of models: one declarative entry per architecture.

To support an architecture, write one ``Family`` in a file beside this one and list it in ``llm_surgeon.models``; or
write it in code of your own and hand it to ``register_family`` (``docs/families.md``). ``check_family`` in
``llm_surgeon.testing`` then checks it on a tiny random model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llm_surgeon.models.parts import PartEntry


@dataclass(frozen=True)
class Residual:
    """Names of the modules that carry the residual stream, besides the linear layers of the blocks and the head.

    A model may lack any of the modules that are optional.

    Attributes:
        tokens: Path of the token embedding.
        norms: Names of a block's norms, within the block.
        final_norm: Path of the norm after the last block, optional.
        positions: Path of the learned embedding of positions, optional.
        project_in: Path of the linear layer between token embeddings of another width and the stream, optional.
        project_out: Path of the linear layer between the stream and a head of another width, optional.
        multiplier: Entry of the configuration with the factor of all that the parts add to the stream, optional.
    """

    tokens: str
    norms: tuple[str, ...]
    final_norm: str
    positions: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    multiplier: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        model_class: Name of the class in transformers that computes the language model's logits.
        config_class: Name of the configuration class in transformers.
        blocks: Path of the list of decoder blocks.
        parts: Entries of the parts of a block, such as ``Attention`` and ``FeedForward``, in the order of the forward
            pass. A block has the parts whose layers it has, so blocks may alternate between kinds.
        residual: Names of the modules that carry the residual stream.
        per_block: Entries of the configuration that list a value for each block. In an export without some blocks
            the lists are shorter.
        transposed: Whether the linear layers are ``Conv1D``, whose weights are stored ``[columns, rows]``.
        text_config: Entry of the configuration with the language model's own configuration, if the language model is
            one tower of a larger model. What is outside that tower stays as it is in the checkpoint.
        auto_class: Name of the class in transformers that loads a checkpoint of the type, whatever its class.
        numbered: Whether the model hands something to its blocks by their numbers, so that none can be left out.
    """

    model_type: str
    model_class: str
    config_class: str
    blocks: str
    parts: tuple[PartEntry, ...]
    residual: Residual
    transposed: bool = False
    per_block: tuple[str, ...] = ("layer_types",)
    text_config: str | None = None
    auto_class: str = "AutoModelForCausalLM"
    numbered: bool = False

    def settings_of(self, config: Any) -> Any:
        """Configuration of the language model within that of the whole model; in most families they are the same."""
        return config if self.text_config is None else getattr(config, self.text_config)

    @property
    def tower(self) -> str:
        """Path of the language model without its head."""
        return self.blocks.rpartition(".")[0]

    def short_name(self, kind: str) -> str:
        """Last part of a layer's name within a block, or the whole name if another layer has the same last part.

        Numbers in the name are left out: all experts have layers of the same kind.
        """
        kind = re.sub(r"\.\d+(?=\.)", "", kind)
        last = kind.rpartition(".")[2]
        return last if sum(name.rpartition(".")[2] == last for name in self.layers) == 1 else kind

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers of all parts, within a block, each once."""
        return tuple(dict.fromkeys(name for part in self.parts for group in part.input_groups for name in group))
