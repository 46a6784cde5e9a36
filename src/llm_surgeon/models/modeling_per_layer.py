"""Decoder blocks of the model's own class, each with widths of its own.

This text travels inside exported checkpoints, so it needs torch and transformers only, and nothing of the package that
wrote it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def config_of_layer(config: Any, number: int) -> Any:
    """The configuration of one decoder block: that of the model, with the block's own widths.

    Args:
        config: Configuration of the model, with ``per_layer_config``.
        number: Number of the block.
    """
    given = config.per_layer_config
    if not isinstance(given, Mapping):
        return given[number]
    # Versions of transformers before 5.19 leave the entry as it is in the file.
    own = copy.copy(config)
    for name, value in {int(key): entries for key, entries in given.items()}.get(number, {}).items():
        setattr(own, name, value)
    return own


def narrow_blocks(blocks: nn.ModuleList, config: Any) -> None:
    """Replace decoder blocks by blocks of the same class with their own widths, values still to be loaded.

    Args:
        blocks: The blocks of the model, as wide as its configuration says.
        config: Configuration of the model, with ``per_layer_config``.
    """
    for number, block in enumerate(blocks):
        blocks[number] = type(block)(config_of_layer(config, number), number)


@contextlib.contextmanager
def as_one(config: Any) -> Iterator[None]:
    """Let a configuration be that of the model as a whole for a while.

    The blocks of the dense model are built from it before they are replaced, and transformers would warn of each entry
    that differs between blocks.
    """
    aside = vars(config).pop("_heterogeneity_spec", None)
    try:
        yield
    finally:
        if aside is not None:
            vars(config)["_heterogeneity_spec"] = aside


class OwnWidths:
    """Mixin for models whose blocks have configurations of their own."""

    config: Any

    def set_attn_implementation(self, *args: Any, **settings: Any) -> None:
        """Choose the implementation of attention, in all blocks."""
        super().set_attn_implementation(*args, **settings)  # type: ignore[misc]
        for module in self.modules():  # type: ignore[attr-defined]
            own = getattr(module, "config", None)
            if own is not None and own is not self.config:
                own._attn_implementation = self.config._attn_implementation
