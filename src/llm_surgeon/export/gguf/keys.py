"""The keys of a GGUF file that say the sizes and settings of a model."""

from __future__ import annotations

from typing import Any

import gguf

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.gguf.architectures import Architecture
from llm_surgeon.export.gguf.parts import Block
from llm_surgeon.export.gguf.rope import Rope
from llm_surgeon.export.standard_layers import BlockWidths, head_width

# Words of ``config.layer_types`` for blocks whose attention reaches back a window only.
_WINDOWED = "sliding_attention"
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def add_keys(
    writer: gguf.GGUFWriter,
    settings: Any,
    row: Architecture,
    rope: Rope | None,
    blocks: list[Block],
    widths: list[BlockWidths],
) -> None:
    """Add the keys of a model.

    Args:
        writer: Writer of the file.
        settings: Configuration of the model.
        row: Its architecture in llama.cpp.
        rope: Its rotary embeddings, if it has any.
        blocks: The blocks that the file has.
        widths: Their widths in the file.
    """
    head = head_width(settings)
    writer.add_block_count(len(blocks))
    writer.add_context_length(context_length(settings, row))
    writer.add_embedding_length(settings.hidden_size)
    writer.add_vocab_size(settings.vocab_size)
    writer.add_feed_forward_length(_one_or_all(row, [block.neurons for block in widths]))
    writer.add_head_count(_one_or_all(row, [block.heads for block in widths]))
    writer.add_head_count_kv(_one_or_all(row, [block.kv_heads for block in widths]))
    writer.add_key_length(head)
    writer.add_value_length(head)
    _add_norms(writer, settings, row)
    if rope is not None:
        _add_rope(writer, rope)
    if row.windows:
        _add_windows(writer, settings, [block.number for block in blocks])
    if row.name == "gptneox":
        writer.add_parallel_residual(bool(settings.use_parallel_residual))
    if row.caps:
        writer.add_attn_logit_softcapping(settings.attn_logit_softcapping)
        writer.add_final_logit_softcapping(settings.final_logit_softcapping)


def context_length(settings: Any, row: Architecture) -> int:
    """Number of tokens for which the engine computes what the model does.

    An architecture without windows computes full attention, which is the same up to the width of the window.
    """
    longest: int = settings.max_position_embeddings
    return longest if row.windows else min(longest, window_of(settings) or longest)


def window_of(settings: Any) -> int | None:
    """Width of the window to which some blocks attend; None if all attend to everything."""
    kinds = getattr(settings, "layer_types", None)
    window: int | None = getattr(settings, "sliding_window", None)
    return None if kinds is not None and _WINDOWED not in kinds else window


def check_settings(form: str, settings: Any, row: Architecture, blocks: list[int]) -> None:
    """Refuse settings that the graph of an architecture does not read.

    Args:
        form: Name of the format, for the message.
        settings: Configuration of the model.
        row: Its architecture in llama.cpp.
        blocks: Numbers of the blocks that the file has.

    Raises:
        ConfigError: If there are any.
    """
    wrong = {
        "scale_attn_by_inverse_layer_idx": bool(getattr(settings, "scale_attn_by_inverse_layer_idx", False)),
        "scale_attn_weights": not getattr(settings, "scale_attn_weights", True),
        "add_cross_attention": bool(getattr(settings, "add_cross_attention", False)),
        "use_bidirectional_attention": bool(getattr(settings, "use_bidirectional_attention", False)),
        "query_pre_attn_scalar": not _scale_is_known(settings, row, len(blocks)),
        "layer_types": row.windows and not any(_windows(settings, blocks)),
        **{name: bool(getattr(settings, name, None)) != row.caps for name in _CAPS},
    }
    for name in (name for name, is_wrong in wrong.items() if is_wrong):
        raise ConfigError(
            f"In the format {form}, llama.cpp's architecture {row.name} cannot have {name} = "
            f"{getattr(settings, name)}.",
            "Leave the format out: --format hf takes the model as it is.",
        )


def _scale_is_known(settings: Any, row: Architecture, blocks: int) -> bool:
    """Whether the engine, which computes the scale of queries from sizes, computes the model's."""
    scalar = getattr(settings, "query_pre_attn_scalar", None)
    if scalar is None:
        return True
    if blocks == row.odd_scale:
        return bool(scalar == settings.hidden_size // settings.num_attention_heads)
    return bool(scalar == head_width(settings))


def _one_or_all(row: Architecture, numbers: list[int]) -> int | list[int]:
    return numbers if row.per_block else numbers[0]


def _add_norms(writer: gguf.GGUFWriter, settings: Any, row: Architecture) -> None:
    if row.layer_norm:
        names = ("layer_norm_epsilon", "layer_norm_eps")
        writer.add_layer_norm_eps(next(getattr(settings, name) for name in names if hasattr(settings, name)))
    else:
        writer.add_layer_norm_rms_eps(settings.rms_norm_eps)


def _add_rope(writer: gguf.GGUFWriter, rope: Rope) -> None:
    writer.add_rope_dimension_count(rope.rotated)
    writer.add_rope_freq_base(rope.base)
    if rope.windowed_base is not None:
        writer.add_float32(f"{writer.arch}.rope.freq_base_swa", rope.windowed_base)
    for name, value in rope.scaling.items():
        key = f"{writer.arch}.rope.scaling.{name}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)


def _add_windows(writer: gguf.GGUFWriter, settings: Any, blocks: list[int]) -> None:
    windows = _windows(settings, blocks)
    writer.add_sliding_window(settings.sliding_window)
    # As a number where that says it, as older engines know nothing else.
    writer.add_sliding_window_pattern(_period(windows) or windows)


def _windows(settings: Any, blocks: list[int]) -> list[bool]:
    """Whether each block attends to a window only."""
    return [settings.layer_types[block] == _WINDOWED for block in blocks]


def _period(windows: list[bool]) -> int | None:
    """Number of blocks after which windows repeat, the last of them without a window; None if they do not so."""
    for period in range(2, len(windows) + 1):
        if windows == [number % period < period - 1 for number in range(len(windows))]:
            return period
    return None
