"""Writing of a GGUF file, tensor by tensor, so that no second copy of the model is in memory."""

from __future__ import annotations

import errno
import math
import os
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy
from gguf import GGMLQuantizationType as Kind

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.format import Exported
from llm_surgeon.export.gguf.architectures import Architecture, Needs, choose
from llm_surgeon.export.gguf.keys import add_keys, check_settings
from llm_surgeon.export.gguf.parts import Block, biases_of, blocks_of, check_family, entries_of
from llm_surgeon.export.gguf.rope import Rope, rope_kind, rope_of
from llm_surgeon.export.gguf.tensors import Planned, plan_tensors, stored_widths
from llm_surgeon.export.gguf.tokenizer import add_tokenizer
from llm_surgeon.export.standard_layers import check_without_gaps, head_width
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.system.files import writing

# The number by which the engine's own quantiser names each type of a file.
_FILE_TYPES = {
    Kind.F32: gguf.LlamaFileType.ALL_F32,
    Kind.F16: gguf.LlamaFileType.MOSTLY_F16,
    Kind.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    Kind.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


@dataclass(frozen=True)
class Said:
    """A model in the terms of llama.cpp.

    Attributes:
        row: The architecture.
        rope: Rotary embeddings, if there are any.
        blocks: The blocks that the file has.
    """

    row: Architecture
    rope: Rope | None
    blocks: list[Block]


def say(form: str, exported: Exported) -> Said:
    """Find the terms for a model.

    Args:
        form: Name of the format, for messages.
        exported: The model.

    Raises:
        ConfigError: If llama.cpp has none.
    """
    family, settings = exported.family, exported.model.config
    check_family(form, family)
    check_without_gaps(exported.model, form)
    blocks = blocks_of(exported.model, family)
    widths = [block.widths for block in blocks]
    activation = entries_of(family)[1].activation
    head = exported.model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"The output head has a bias, which llama.cpp does not add, so that the format {form} cannot say it.",
            "Leave the format out: --format hf takes the model as it is.",
        )
    needs = Needs(
        uneven=len(set(widths)) > 1 or not (widths[0].heads and widths[0].neurons),
        narrow=any(block.heads * head_width(settings) != settings.hidden_size for block in widths),
        tied=head.weight is exported.model.get_input_embeddings().weight,
        rope=rope_kind(settings),
        biases=biases_of(blocks, family),
        activation=str(getattr(settings, activation or "")),
    )
    row = choose(form, family.model_type, needs)
    check_settings(form, settings, row, [block.number for block in blocks])
    return Said(row, rope_of(settings, form, not row.partial) if row.rotary else None, blocks)


def write_file(said: Said, exported: Exported, kind: Kind, path: Path) -> None:
    """Write a model.

    Args:
        said: The model in the terms of llama.cpp.
        exported: The model.
        kind: Type of its matrices; vectors are float32.
        path: The file.

    Raises:
        UnsupportedModelError: If the tokenizer cannot be said.
        DiskSpaceError: If the disk is full.
        OutputError: If writing fails for another reason.
    """
    model = exported.model
    writer = gguf.GGUFWriter(None, said.row.name)
    # Of a name with a family in it, as Phi-3, the engine would conclude what tokens there are.
    writer.add_name("pruned with LLM Surgeon")
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_keys(writer, model.config, said.row, said.rope, said.blocks, stored_widths(said.row, said.blocks))
    add_tokenizer(writer, exported.tokenizer, model.config.vocab_size)
    tensors = plan_tensors(model, exported.family, said.row, said.rope, said.blocks)
    for tensor in tensors:
        _announce(writer, tensor, _kind_of(tensor, kind))
    with writing(path, sum(parameter.nbytes for parameter in model.parameters())):
        try:
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                _write_values(writer, _values(tensor, _kind_of(tensor, kind)))
                weights_of(model).forget()
        finally:
            writer.close()


def _kind_of(tensor: Planned, kind: Kind) -> Kind:
    """Type of a tensor in a file; where blocks of columns do not come out even, the next larger type."""
    if not tensor.is_matrix:
        return Kind.F32
    return Kind.F16 if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _announce(writer: gguf.GGUFWriter, tensor: Planned, kind: Kind) -> None:
    """Add a tensor's name, shape and type, which stand in the file before all values."""
    shape = gguf.quant_shape_to_byte_shape(tensor.shape, kind)
    writer.add_tensor_info(tensor.name, shape, numpy.dtype(numpy.uint8), math.prod(shape), raw_dtype=kind)


def _write_values(writer: gguf.GGUFWriter, values: numpy.ndarray) -> None:
    try:
        writer.write_tensor_data(values)
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy says how much it could not write, but not why.
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None


def _values(tensor: Planned, kind: Kind) -> numpy.ndarray:
    made = tensor.make()
    # A tensor of another shape would move all that follow it.
    assert tuple(made.shape) == tensor.shape, f"{tensor.name}: {tuple(made.shape)} is not {tensor.shape}"
    values = made.cpu().float().contiguous().numpy()
    with numpy.errstate(over="ignore"):
        written: numpy.ndarray = gguf.quantize(values, kind)
    if kind == Kind.F16 and not numpy.isfinite(written).all() and numpy.isfinite(values).all():
        raise ConfigError(
            f"A weight of {tensor.name} is {abs(values).max():.3g}, and float16 ends at 65504.",
            "Choose a type with a wider range: --format gguf-bf16 or gguf-f32.",
        )
    return written
