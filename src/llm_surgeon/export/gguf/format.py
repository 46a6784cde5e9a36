"""The formats of GGUF, one for each type of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedTokenizerBase

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.companions import copy_licences
from llm_surgeon.export.format import Exported, Format
from llm_surgeon.export.gguf.architectures import Architecture, Needs, choose
from llm_surgeon.export.gguf.keys import check_settings, context_length
from llm_surgeon.export.gguf.parts import check_family, entries_of, paths_of
from llm_surgeon.export.gguf.rope import rope_kind, rope_of
from llm_surgeon.export.gguf.tokenizer import tokenizer_keys
from llm_surgeon.export.gguf.verify import verify_file
from llm_surgeon.export.gguf.write import say, write_file
from llm_surgeon.export.standard_layers import head_width
from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.models import family_of
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.family import Family
from llm_surgeon.recipe.config import PruneConfig

# Version of xllamacpp, which brings llama.cpp, that the table of architectures was verified with.
VERIFIED = "2026.10.11549"
# Structures that leave matrices without gaps, which is all that llama.cpp knows.
_STRUCTURES = frozenset({"neurons", "heads", "blocks"})
_KINDS = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}


class GGUF(Format):
    """One file for llama.cpp and the engines built on it.

    Norms, biases and other vectors are float32 in every type. Q8_0 has blocks of 32 columns: a matrix with another
    number of columns becomes float16 instead, as with llama.cpp's own quantiser.

    Attributes:
        kind: Type of the matrices; None for the type that the model has in memory.
    """

    name = "gguf"
    kind: ClassVar[Kind | None] = None
    engine = "llama.cpp, by pip install xllamacpp"

    def check_result(self, exported: Exported) -> None:
        """Refuse what no architecture of llama.cpp can be; see ``Format.check_result``."""
        self._type(exported.model.dtype)
        say(self.name, exported)

    def loaders(self, config: PruneConfig, settings: Any) -> tuple[str, ...]:
        """Engines that load the file; see ``Format.loaders``."""
        family = family_of(settings.model_type)
        row = choose(self.name, family.model_type, _foreseen(config, family, settings, frozenset()))
        remarks = "".join(f"; {remark}" for remark in _remarks(config, settings, row))
        return (
            f"llama.cpp and what is built on it (Ollama, LM Studio, ...), as architecture {row.name}; verified with "
            f"llama.cpp of xllamacpp {VERIFIED}{remarks}",
        )

    def check(self, config: PruneConfig, anatomy: Anatomy, settings: Any) -> None:
        """Find out before the work whether llama.cpp has an architecture for the result; see ``Format.check``."""
        check_family(self.name, anatomy.family)
        if others := [part for part in config.parts if part not in _STRUCTURES]:
            raise ConfigError(
                f"The format {self.name} has whole heads and neurons only, and {'+'.join(others)} leaves matrices with "
                "gaps.",
                "Use --structure neurons+heads, or leave the format out: --format hf takes every structure.",
            )
        family = anatomy.family
        biased = {
            layer.name.removeprefix(f"{family.blocks}.{layer.block}.")
            for layer in anatomy.layers.values()
            if layer.bias
        }
        biases = frozenset(kind for kind, path in paths_of(family) if path in biased)
        row = choose(self.name, family.model_type, _foreseen(config, family, settings, biases))
        check_settings(self.name, settings, row, list(range(anatomy.blocks)))
        if row.rotary:
            rope_of(settings, self.name, not row.partial)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase, settings: Any) -> None:
        """Find out before the work whether llama.cpp can do what the tokenizer does; see ``Format.check_tokenizer``."""
        tokenizer_keys(tokenizer, settings.get_text_config().vocab_size)

    def loading(self) -> tuple[str, ...]:
        """Lines of Python that load the file with xllamacpp; see ``Format.loading``."""
        return (
            "from pathlib import Path",
            "import xllamacpp",
            "parameters = xllamacpp.CommonParams()",
            "parameters.model.path = str(next(Path({place}).glob('*.gguf')))",
            "parameters.n_ctx = 2048",
            "server = xllamacpp.Server(parameters)",
            # A server that is asked nothing may wait for ever when it is to end.
            "print(server.handle_completions({'prompt': 'The', 'max_tokens': 16})['choices'][0]['text'])",
        )

    def nbytes(self, parameters: int, dtype: torch.dtype) -> int:
        """Bytes of the file; see ``Format.nbytes``."""
        columns, size = GGML_QUANT_SIZES[self._type(dtype)]
        return parameters * size // columns

    def write(self, exported: Exported, directory: Path) -> bool:
        """Write the file; see ``Format.write``."""
        kind = self._type(exported.model.dtype)
        write_file(say(self.name, exported), exported, kind, directory / _file(kind))
        if exported.source is not None:
            copy_licences(exported.source, directory)
        return True

    def verify(self, exported: Exported, directory: Path, plain: bool) -> ReloadCheck | None:
        """Compare what llama.cpp computes with the model in memory; see ``verify_file``."""
        kind = self._type(exported.model.dtype)
        return verify_file(say(self.name, exported), exported, kind, directory / _file(kind))

    def weight_bytes(self, directory: Path) -> int:
        """Bytes of the file."""
        return sum(path.stat().st_size for path in directory.glob("model-*.gguf"))

    def _type(self, dtype: torch.dtype) -> Kind:
        # Float32 has the number 0.
        kind = _KINDS.get(dtype) if self.kind is None else self.kind
        if kind is None:
            raise ConfigError(
                f"The format {self.name} has the type of the model in memory, and GGUF has no {dtype}.",
                "Give the type: --format gguf-f16, or one of gguf-f32, gguf-bf16 and gguf-q8_0.",
            )
        return kind


class Float32(GGUF):
    """GGUF with matrices of float32."""

    name = "gguf-f32"
    kind = Kind.F32


class Float16(GGUF):
    """GGUF with matrices of float16."""

    name = "gguf-f16"
    kind = Kind.F16


class BFloat16(GGUF):
    """GGUF with matrices of bfloat16."""

    name = "gguf-bf16"
    kind = Kind.BF16


class Q8(GGUF):
    """GGUF with matrices of 8 bits for a weight, and a float16 scale for each 32."""

    name = "gguf-q8_0"
    kind = Kind.Q8_0


def _file(kind: Kind) -> str:
    return f"model-{kind.name}.gguf"


def _foreseen(config: PruneConfig, family: Family, settings: Any, biases: frozenset[str]) -> Needs:
    """Needs of what a recipe leaves, by the dense model."""
    activation = entries_of(family)[1].activation
    return Needs(
        uneven=bool(config.parts) and not config.uniform,
        narrow="heads" in config.parts or settings.num_attention_heads * head_width(settings) != settings.hidden_size,
        tied=bool(settings.tie_word_embeddings),
        rope=rope_kind(settings),
        biases=biases,
        activation=str(getattr(settings, activation or "")),
    )


def _remarks(config: PruneConfig, settings: Any, row: Architecture) -> Iterator[str]:
    """What not to expect of the engine."""
    if not config.parts:
        yield "all shapes are those of the dense model, and zeros by themselves make it no faster"
    if (length := context_length(settings, row)) < settings.max_position_embeddings:
        yield f"for texts of at most {length} tokens, as the architecture has no attention windows"
    if row.approximate:
        yield "its GELU is an approximation, to about three digits"
