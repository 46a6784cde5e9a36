"""What a family of models looks like: one declarative entry per architecture.

To support an architecture, write one ``Family`` in a file beside this one and list it in ``llm_surgeon.models``; or
write it in code of your own and hand it to ``register_family`` (``docs/families.md``). ``check_family`` in
``llm_surgeon.testing`` then checks it on a tiny random model.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_surgeon.models.parts import PartEntry


@dataclass(frozen=True)
class Residual:
    """Names of what reads or writes the residual stream, besides the linear layers of the blocks and the head.

    A model may be without any of those that are optional.

    Attributes:
        tokens: Path of the token embedding.
        norms: Names, within a block, of its norms.
        final_norm: Path of the norm after the last block, optional.
        positions: Path of the learned embedding of positions, optional.
        project_in: Path of the linear layer between token embeddings of another width and the stream, optional.
        project_out: Path of the linear layer between the stream and a head of another width, optional.
    """

    tokens: str
    norms: tuple[str, ...]
    final_norm: str
    positions: str | None = None
    project_in: str | None = None
    project_out: str | None = None


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: ``config.model_type`` in transformers.
        model_class: The class in transformers that computes the language model's logits.
        config_class: Its configuration class.
        blocks: Path of the list of decoder blocks.
        parts: The parts of a block, such as ``Attention`` and ``FeedForward``, in the order of the forward pass. A
            block has those whose layers it has: some may have one kind, and others another in its place.
        residual: What carries the residual stream.
        transposed: Whether its linear layers are ``Conv1D``, whose weights are stored ``[columns, rows]``.
    """

    model_type: str
    model_class: str
    config_class: str
    blocks: str
    parts: tuple[PartEntry, ...]
    residual: Residual
    transposed: bool = False

    def short_name(self, kind: str) -> str:
        """The last part of a layer's name within a block, or all of it where two layers would have the same."""
        last = kind.rpartition(".")[2]
        return last if sum(name.rpartition(".")[2] == last for name in self.layers) == 1 else kind

    @property
    def layers(self) -> tuple[str, ...]:
        """Names, within a block, of the layers of all parts, each once."""
        return tuple(dict.fromkeys(name for part in self.parts for group in part.input_groups for name in group))
