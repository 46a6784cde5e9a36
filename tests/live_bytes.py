"""The count of ``planning.trace`` on tensors that have numbers."""

import torch

from llm_surgeon.planning.trace import CountedBytes


class CountingRealTensors(CountedBytes):
    """The same count where numbers exist: every operation gives what it gives."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in torch.utils._pytree.tree_leaves(result):
            if isinstance(item, torch.Tensor):
                self._count(item.untyped_storage())
        return result
