"""Weights shared out among processes (FSDP2): each holds a part of every matrix, and a block is whole while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from llm_surgeon.system.processes import Processes


def share_out(module: nn.Module, blocks: str, processes: Processes) -> None:
    """Share out the weights of a module, block by block, and what is outside of its blocks together.

    Args:
        module: Module whose forward pass uses all weights.
        blocks: Path of the list of blocks in it.
        processes: Processes that share; of one, the module stays as it is.
    """
    if processes.count == 1:
        return
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    for block in cast(nn.ModuleList, module.get_submodule(blocks)):
        fully_shard(block, mesh=mesh)
    # What is outside of the blocks stays whole up to the backward pass, if there is one.
    fully_shard(module, mesh=mesh, reshard_after_forward=not any(one.requires_grad for one in module.parameters()))
    # The first pass of the whole module makes it known to its blocks, which may run without it later. At its end the
    # weights have to be parts again, as they are what is trained and kept.
    with together(module), torch.no_grad():
        module(torch.zeros(1, 2, dtype=torch.int64, device=processes.device))


@contextmanager
def together(module: nn.Module) -> Iterator[None]:
    """Have the weights outside of the blocks whole within, as parts of a shared module run without its own pass."""
    shared = cast(Any, module) if hasattr(module, "unshard") else None
    if shared is not None:
        shared.unshard()
    try:
        yield
    finally:
        if shared is not None:
            shared.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which changes with it; a tensor that is not shared is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor put together of all processes' parts; all of them have to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
