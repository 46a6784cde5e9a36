"""The kinds of part that a block is made of: one file each.

A family's entry names the parts of a block (``Family.parts``). Another kind is a ``PartEntry`` and a ``Part`` in one
file, here or in code of one's own; nothing else has to know of it (``docs/families.md``).
"""

from llm_surgeon.models.parts.attention import Attention, AttentionPart
from llm_surgeon.models.parts.feed_forward import FeedForward, FeedForwardPart
from llm_surgeon.models.parts.part import (
    ChannelOrder,
    Part,
    PartEntry,
    Rows,
    channels_in,
    columns_of,
    has_module,
    rows_of,
)

__all__ = [
    "Attention",
    "AttentionPart",
    "ChannelOrder",
    "FeedForward",
    "FeedForwardPart",
    "Part",
    "PartEntry",
    "Rows",
    "channels_in",
    "columns_of",
    "has_module",
    "rows_of",
]
