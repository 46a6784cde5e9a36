"""Kinds of parts that a block is made of: one file each.

A family's entry names the parts of a block (``Family.parts``). A new kind is a ``PartEntry`` and a ``Part`` in one
file, here or in code of your own; no other file changes (``docs/families.md``).
"""

from llm_surgeon.models.parts.attention import Attention, AttentionPart
from llm_surgeon.models.parts.delta_net import DeltaNet, DeltaNetPart
from llm_surgeon.models.parts.feed_forward import FeedForward, FeedForwardPart
from llm_surgeon.models.parts.jointly_normed import JointlyNormedAttention, JointlyNormedPart
from llm_surgeon.models.parts.mixture import MixtureOfExperts, MixturePart
from llm_surgeon.models.parts.part import (
    ChannelOrder,
    Part,
    PartEntry,
    Rows,
    channels_in,
    check_activation,
    columns_of,
    equally_many,
    has_module,
    rows_of,
)
from llm_surgeon.models.parts.plain_layers import PlainLayers, PlainPart

__all__ = [
    "Attention",
    "AttentionPart",
    "ChannelOrder",
    "DeltaNet",
    "DeltaNetPart",
    "FeedForward",
    "FeedForwardPart",
    "JointlyNormedAttention",
    "JointlyNormedPart",
    "MixtureOfExperts",
    "MixturePart",
    "Part",
    "PartEntry",
    "PlainLayers",
    "PlainPart",
    "Rows",
    "channels_in",
    "check_activation",
    "columns_of",
    "equally_many",
    "has_module",
    "rows_of",
]
